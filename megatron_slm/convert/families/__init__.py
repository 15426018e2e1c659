"""The families of Hugging Face models that are read and written, one file each. No torch.

registry.py     all of them, in the order in which an export tries them
family.py       what a family says: its names, its keys, its settings both ways, its tensors
llama_like.py   what most families share: the keys, settings and tensor names of Llama
rope.py         rotary embedding and its scaling, both ways
windows.py      sliding windows, both ways
llama_windows.py  a Llama that has them
rope_by_layer.py  rotary embeddings of layers with a window and of the others, both ways
mixtures.py     mixtures of experts, both ways
biases.py       the biases of attention, both ways
activations.py  activations of feed-forward layers, both ways
plain_heads.py  what families without grouped queries share

docs/conversion.md says how a family is added.
"""
