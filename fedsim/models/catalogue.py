"""Names of what this room offers, as ``"module:attribute"``. Importing it costs nothing."""

from __future__ import annotations

MODELS = {
    "logistic": "fedsim.models.vision:logistic",
    "mlp": "fedsim.models.vision:mlp",
    "cnn": "fedsim.models.vision:cnn",
    "lora": "fedsim.models.lora:lora",
    "offsite": "fedsim.models.offsite:offsite",
    "char_lstm": "fedsim.models.text:char_lstm",
    "char_gpt": "fedsim.models.text:char_gpt",
    "hf_causal_lm": "fedsim.models.language:hf_causal_lm",
    "hf_encoder": "fedsim.models.language:hf_encoder",
}
