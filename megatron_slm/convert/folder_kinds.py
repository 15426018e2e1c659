"""Advice for folders that hold a model in another form than safetensors; no torch."""

from pathlib import Path


def other_kind(folder: Path) -> str:
    """What to do with `folder`, to be added to a sentence that it lacks something; else empty."""
    if (folder / "adapter_config.json").is_file():
        return (
            ". The folder holds an adapter (PEFT): merge it into its base model "
            "(merge_and_unload), and save that"
        )
    if any(folder.glob("pytorch_model*.bin")):
        return (
            ". The folder holds pytorch_model.bin, which may run code when it is read: open it "
            "with transformers where you trust it; its save_pretrained writes safetensors"
        )
    if any(folder.glob("*.gguf")):
        return (
            ". The folder holds a GGUF file: give the folder of the original model, or open it "
            "with transformers (gguf_file=...) and save it"
        )
    return ""
