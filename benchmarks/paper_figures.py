"""Compare the memory figures of the QLoRA paper (arXiv:2305.14314) with the sums of their terms.

    python benchmarks/paper_figures.py

The paper's "GB" are GiB: its own bars of 65B (model, adapters, optimizer: 44,274 MiB) already exceed 45.0e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.config.sections import LoraConfig
from qlora_dist.nf4.nf4_layout import NF4Layout
from qlora_dist.plan.layer_spec import decoder_layer_specs
from qlora_dist.plan.model_config import read_model_config
from qlora_dist.plan.model_spec import make_model_spec

GIB = 2**30
TOTALS = {
    "llama-7b": 6.9,
    "llama-13b": 11.3,
    "llama-33b": 24.7,
    "llama-65b": 45.0,
}  # figure 6: one sequence of 512 tokens
GUANACO = {"llama-7b": 5, "llama-13b": 10, "llama-33b": 21, "llama-65b": 41}  # table 6, rounded


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes that a single GPU holds."""

    base: int
    base_without_double_quantization: int
    embeddings_fp32: int
    """Bytes of embedding, head and norms, which `prepare_model_for_kbit_training` casts to fp32."""
    adapters: int
    """Bytes of the adapters in bf16."""
    gradients: int
    moments: int
    """Bytes of both moments in fp32."""
    inputs: int
    """Bytes of the layers' inputs that checkpointing keeps, for 512 tokens in bf16."""
    context: int = 2**29

    @property
    def as_printed(self) -> int:
        """Sum nearest to the paper's totals: without double quantization, embeddings in fp32."""
        return self.base_without_double_quantization + self._rest

    @property
    def as_described(self) -> int:
        """Sum with double quantization, as described in the paper."""
        return self.base + self._rest

    @property
    def _rest(self) -> int:
        return self.embeddings_fp32 + self.adapters + self.gradients + self.moments + self.inputs + self.context


def states(name: str, r: int = 64) -> ModelStates:
    """Return the bytes of a model with adapters on all linear layers."""
    config = read_model_config(name)
    lora = LoraConfig(r=r)
    matrices = [matrix for layer in decoder_layer_specs(config, lora) for matrix in layer.matrices]
    plain = [p for unit in make_model_spec(config, lora).units for p in unit.parameters if not p.is_quantized]
    adapters = sum(p.numel for p in plain if p.trained)

    def base_bytes(*, double_quant: bool) -> int:
        return sum(
            NF4Layout(shape=(m.rows, m.in_features), block_size=64, double_quant=double_quant).total_bytes
            for m in matrices
        )

    return ModelStates(
        base=base_bytes(double_quant=True),
        base_without_double_quantization=base_bytes(double_quant=False),
        embeddings_fp32=4 * sum(p.numel for p in plain if not p.trained),
        adapters=2 * adapters,
        gradients=2 * adapters,
        moments=8 * adapters,
        inputs=2 * 512 * config["hidden_size"] * config["num_hidden_layers"],
    )


def constants_bits() -> float:
    """Return the bits per parameter of double-quantized constants: 8/64 + 32/(64 x 256)."""
    layout = NF4Layout(shape=(2**14, 2**14))
    return 8 * (layout.total_bytes - layout.codes.stop) / layout.numel


def main() -> None:
    for name, published in TOTALS.items():
        s = states(name)
        guanaco = (s.as_printed - s.moments) / GIB
        print(
            f"{name}: {s.as_printed / GIB:.2f} / {published} GiB {s.as_printed / GIB / published - 1:+.1%}; Guanaco, "
            f"moments paged out: {guanaco:.1f} / {GUANACO[name]}; with double quantization {s.as_described / GIB:.2f}"
        )
        terms = {key: value for key, value in vars(s).items() if key != "base"}
        print("   " + ", ".join(f"{key} {value / GIB:.2f}" for key, value in terms.items()))
    llama_65b = states("llama-65b")
    saved = llama_65b.base_without_double_quantization - llama_65b.base
    print(f"constants: {constants_bits():.3f} bits a parameter; double quantization saves {saved / 1e9:.2f} GB at 65B")
    print(f"65B: {llama_65b.as_printed / GIB:.1f} GiB with all states, below 48")
    for r in (16, 64):
        s = states("llama-3.1-405b", r)
        weights, trained = s.base + s.embeddings_fp32 // 2, 16 * s.adapters // 2
        print(
            f"405B, r = {r}: {weights / 1e9:.1f} GB of weights + {trained / 1e9:.1f} GB of adapters, gradients and "
            f"moments in fp32 = {(weights + trained) / 1e9:.1f} GB: a sum of states, without the memory of a step"
        )


if __name__ == "__main__":
    main()
