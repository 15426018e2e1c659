"""Settings of all tests: properties are tried without a time limit per example, since a busy machine is no counter-example."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("house")
