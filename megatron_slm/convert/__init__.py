"""Conversion between our checkpoints and Hugging Face folders (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE).

names.py         the one table of names and transforms, read in both directions
stored_state.py  full tensors out of, and into, a checkpoint folder of any parallel layout; one process, no GPU
huggingface.py   config.json and safetensors: export and import of a whole folder
hf_tokenizer.py  a SentencePiece model as a tokenizer.json that gives the same ids
"""
