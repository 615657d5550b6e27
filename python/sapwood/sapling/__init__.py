"""The bundled demo model: a small Llama-style chat model that comes with the package, and the scripts that made it.

Serving needs two names only, `NAME` and `MODEL_DIR`; the scripts (train.py, card.py) are run by hand and are not
imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

NAME: Final = "sapling"
MODEL_DIR: Final = Path(__file__).resolve().parent / "model"  # a Hugging Face checkpoint directory
