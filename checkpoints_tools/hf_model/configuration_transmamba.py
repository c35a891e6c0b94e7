"""Configuration of a TransMamba language model (arXiv 2503.24067) for transformers."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class TransMambaConfig(PreTrainedConfig):
    """Sizes and switches of a TransMamba model.

    `layer_kinds` names every layer: "transmamba", "transformer" (Llama's attention) or "mamba2". `transpoints` holds
    every layer's TransPoint P: tokens at offset P or more in their document are scanned, those before attend; None
    never scans. Keys that start with `ssm_` are for mamba2 layers, those of the convolution also for transmamba.
    """

    model_type = "transmamba"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    head_dim: int = 16
    intermediate_size: int = 352  # 0 leaves the feed-forward network out
    max_position_embeddings: int = 256  # tokens per training window; nothing depends on it
    layer_kinds: list[str] | None = None
    transpoints: list[int | None] | None = None
    rope: str = "attention"  # which readings rotate queries and keys: attention, both, none
    rope_theta: float = 10000.0
    conv_width: int = 4
    conv_activation: str = "silu"  # or none
    mixer_norm: str = "head"  # or none
    d_skip: bool = True
    ssm_expand: int = 2
    ssm_head_dim: int = 64
    ssm_state: int = 128
    ssm_groups: int = 1
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_kinds is None:
            self.layer_kinds = ["transmamba"] * self.num_hidden_layers
        if self.transpoints is None:
            self.transpoints = [0 if kind == "mamba2" else None for kind in self.layer_kinds]
        super().__post_init__(**kwargs)
        for name in ("layer_kinds", "transpoints"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(f"{name} needs one entry for each of the {self.num_hidden_layers} layers")
