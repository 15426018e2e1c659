"""Conversion between our checkpoints and Hugging Face folders (Llama, Mistral, Mixtral, Qwen2,
Qwen3, Qwen3-MoE).

names.py         the one table of names and transforms, read in both directions
stored_state.py  full tensors out of, and into, a checkpoint folder of any parallel layout; one
                 process, no GPU
huggingface.py   safetensors, and a whole folder written or read
model_folder.py  what can be said of such a folder before anything of it is loaded
hf_config.py     config.json: which architecture, and every setting both ways
hf_tokenizer.py  a SentencePiece model as a tokenizer.json that gives the same ids
"""
