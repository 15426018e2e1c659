"""Reading megatron-core's source and signatures, for the two tests of what we rely on in it."""

import ast
import importlib
import importlib.metadata
import inspect
import textwrap

INSTALLED = importlib.metadata.version("megatron-core")


def resolve(module: str, symbol: str = ""):
    found = importlib.import_module(module)
    for part in symbol.split(".") if symbol else ():
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


def core(dotted: str):
    """The object named by "module:attribute" below megatron.core."""
    module, _, symbol = dotted.partition(":")
    return resolve(f"megatron.core.{module}", symbol)


def accepts(
    function,
    positional: int,
    keywords: tuple[str, ...] = (),
    *,
    partly: bool = False,
    missing_self: bool = False,
) -> str:
    """Nothing when `function` can be called so, else what it says.

    `partly`: more arguments follow that cannot be seen.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a compiled function has none
        return ""
    bind = signature.bind_partial if partly else signature.bind
    try:
        bind(*[None] * (positional + missing_self), **dict.fromkeys(keywords))
    except TypeError as error:
        return f"{error}; it is {function.__qualname__}{signature}"
    return ""


def calls_in(function, called: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called
    ]
