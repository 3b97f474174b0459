"""Checkpoints as folders that anyone can read: config.json, model.safetensors, README.md, metrics.json and card.yaml.

config.json holds ``format_version``; ``task``, the class path of what was trained, and ``init_args``, its arguments in
plain data, with the backbone, labels, features with their normalisation, and thresholds; ``network``, which class
answers and which of the arguments only training needs; ``data`` and ``training``, how it was made; ``storage``, when
weights were rounded; ``version`` and ``versions``; the ``sha256`` of the weights; and ``ngram``, what is beside
a recogniser's weights for its beam searches in ngram.arpa.gz. metrics.json is as
`seqssm evaluate` writes it, card.yaml is written by hand, and README.md is made of all the others.

Nothing in the folder is ever run: no pickles, and only classes of this package are built.
"""

from seqssm.hub.cards import Notes, model_card
from seqssm.hub.folders import (
    CARD,
    CONFIG,
    METRICS,
    NGRAM,
    NOTES,
    WEIGHTS,
    add_ngram,
    build,
    default,
    fill,
    find_ngram,
    load,
    load_model,
    make_card,
    model_class,
    own_class,
    read_config,
    read_files,
    read_notes,
    read_reports,
    resolve,
    save,
    shipped,
    write_folder,
)
from seqssm.hub.foreign import from_transformers

__all__ = [
    "CARD",
    "CONFIG",
    "METRICS",
    "NGRAM",
    "NOTES",
    "WEIGHTS",
    "Notes",
    "add_ngram",
    "build",
    "default",
    "fill",
    "find_ngram",
    "from_transformers",
    "load",
    "load_model",
    "make_card",
    "model_card",
    "model_class",
    "own_class",
    "read_config",
    "read_files",
    "read_notes",
    "read_reports",
    "resolve",
    "save",
    "shipped",
    "write_folder",
]
