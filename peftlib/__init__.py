"""peftlib: QLoRA, GaLore and a layer-wise hybrid compared on Gemma 3, on free hardware.

Importing it is free: no GPU check, download, seed or folder creation happens here.
"""

__version__ = "0.1.0"
SCHEMA_VERSION = 1  # of every JSON file in a study folder
