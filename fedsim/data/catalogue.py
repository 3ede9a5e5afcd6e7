"""Names of what this room offers, as ``"module:attribute"``. Importing it costs nothing."""

from __future__ import annotations

DATASETS = {
    "digits": "fedsim.data.datasets:digits",
    "mnist5k": "fedsim.data.datasets:mnist5k",
    "synthetic": "fedsim.data.datasets:synthetic",
    "npz": "fedsim.data.datasets:npz",
    "isic": "fedsim.data.isic:isic",
    "pydoc": "fedsim.data.text:pydoc",
    "pydoc_topics": "fedsim.data.text:pydoc_topics",
    "plays": "fedsim.data.text:plays",
    "instruction_tasks": "fedsim.data.instructions:instruction_tasks",
    "natural_instructions": "fedsim.data.instructions:natural_instructions",
    "dolly": "fedsim.data.instructions:dolly",
    "alpaca": "fedsim.data.instructions:alpaca",
    "huggingface": "fedsim.data.hub:huggingface",
}

PARTITIONERS = {
    "iid": "fedsim.data.partitions:iid",
    "natural": "fedsim.data.partitions:natural",
    "planted": "fedsim.data.partitions:planted",
    "two_labels": "fedsim.data.partitions:two_labels",
    "dirichlet": "fedsim.data.label_partitions:dirichlet",
    "inner_dirichlet": "fedsim.data.label_partitions:inner_dirichlet",
    "pathological": "fedsim.data.label_partitions:pathological",
    "shard": "fedsim.data.label_partitions:shard",
    "distribution": "fedsim.data.label_partitions:distribution",
    "continuous": "fedsim.data.label_partitions:continuous",
    "size": "fedsim.data.size_partitions:size",
    "linear": "fedsim.data.size_partitions:linear",
    "square": "fedsim.data.size_partitions:square",
    "exponential": "fedsim.data.size_partitions:exponential",
    "id_to_size": "fedsim.data.size_partitions:id_to_size",
    "grouped_natural": "fedsim.data.size_partitions:grouped_natural",
    "vertical_even": "fedsim.data.size_partitions:vertical_even",
    "vertical_size": "fedsim.data.size_partitions:vertical_size",
}
