"""Conversion between our checkpoints and Hugging Face folders.

huggingface.py        a whole folder written (export), or read into a checkpoint (import_model)
model_folder.py       what is known of such a folder before torch is loaded
families/             the families of models, one file each: settings both ways, tensor names
hf_config.py          config.json of an exported model
hf_settings.py        our settings of a config.json, with the defaults of transformers' own classes
hf_keys.py            every key of a config.json: used, without effect, or refused
folder_kinds.py       advice for folders that hold a model in another form
hf_tokenizer.py       a SentencePiece model as a tokenizer.json that gives the same ids
probe_texts.py        texts on which the two are compared
beside_tokenizer.py   what lies beside a tokenizer and goes with it: templates, end tokens
model_card.py         README.md of an export
begin_of_text.py      what that tokenizer adds to a text
geometry.py           the sizes that the tables need
tensors.py            the tensors of our model: names, shapes, which model has them
transforms.py         how one tensor of ours becomes Hugging Face's, and back
table.py, names.py    what a family's table of names is, and its use in both directions
stored_state.py       full tensors out of, and into, a checkpoint folder of any parallel layout
safetensors_folder.py full tensors out of, and into, safetensors files
"""
