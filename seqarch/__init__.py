"""seqarch: sub-quadratic sequence architectures, one contract on every device.

    from seqarch import LanguageModel, Mamba2

    mixer = Mamba2(d_model=256)            # y, state = mixer(x, state), with x, y: [B, T, D]
    model = LanguageModel(vocab_size=256, d_model=64, pattern="3*mamba2 attention", depth=4)

Here is all that ``seqarch.layers`` (mixers, channel mixers, their configs and registries) and ``seqarch.models``
(stacks and language models) export, and ``load`` for the model of a run. ``seqarch.ops`` holds pure functions on
tensors. Whatever is asked for first is imported then: ``import seqarch`` loads no torch.

Nothing here imports Hydra, a tracker, a plotting library, Triton or a compiled extension.
"""

__version__ = "0.1.0"

_NAMES = {
    "layers": (
        "CHANNEL_MIXERS DSA FAMILIES KDA MIXERS MLA NSA Attention AttentionConfig Based BasedConfig Bidirectional "
        "BigBird BigBirdConfig ChannelMixer Comba CombaConfig DSAConfig DeltaNet DeltaNetConfig ForgettingAttention "
        "ForgettingAttentionConfig GatedDeltaNet GatedDeltaNet2 GatedDeltaNet2Config GatedDeltaNetConfig "
        "GatedDeltaProduct GatedDeltaProductConfig GatedKalmaNet GatedKalmaNetConfig GatedShortConv "
        "GatedShortConvConfig GatedSlotAttention GatedSlotAttentionConfig Gla GlaConfig Gru GruConfig Hgrn Hgrn2 "
        "Hgrn2Config HgrnConfig Hyena HyenaConfig JetBlock JetBlockConfig KDAConfig Layer LayerConfig "
        "LightningAttention LightningAttentionConfig LinearAttention LinearAttentionConfig LoLCATs LoLCATsConfig "
        "LogLinearGatedDeltaNet LogLinearGatedDeltaNetConfig LogLinearMamba2 LogLinearMamba2Config Longformer "
        "LongformerConfig Lstm LstmConfig MLAConfig Mamba Mamba2 Mamba2Config Mamba3 Mamba3Config MambaConfig MesaNet "
        "MesaNetConfig MinGru MinGruConfig Mixer MixtureOfExperts MixtureOfExpertsConfig Mlp MlpConfig Mlstm "
        "MlstmConfig MoBA MoBAConfig NSAConfig PathAttention PathAttentionConfig PreconditionedGatedDeltaNet "
        "PreconditionedGatedDeltaNetConfig PreconditionedKDA PreconditionedKDAConfig Retention RetentionConfig RgLru "
        "RgLruConfig Rwkv6 Rwkv6Config Rwkv7 Rwkv7Config RwkvChannelMix RwkvChannelMixConfig S4d S4dConfig "
        "SlidingWindow SlidingWindowConfig Slstm SlstmConfig SparseMLA SparseMLAConfig StickBreakingAttention "
        "StickBreakingAttentionConfig SwiGlu SwiGluConfig build_channel_mixer build_mixer channel_mixer_class "
        "clone_state detach_state materialize measured_state_bytes mixer_class register_channel_mixer register_mixer "
        "state_rows"
    ),
    "models": (
        "LMConfig LanguageModel LayerPattern Stack StackConfig dequantize dequantize_state parameter_groups "
        "parse_pattern quantize quantize_state state_rows tile_pattern weight_bytes"
    ),
    "checkpoints.loading": "load",
}
"""By module what it exports, its ``__all__``: a table, so that nothing is imported or read before it is asked for."""

TYPE_CHECKING = False  # Type checkers know the name; to import it from typing would take longer than all the rest.
if TYPE_CHECKING:
    from seqarch import checkpoints as checkpoints
    from seqarch import convert as convert
    from seqarch import interop as interop
    from seqarch import layers as layers
    from seqarch import models as models
    from seqarch import ops as ops
    from seqarch import parallel as parallel
    from seqarch import pretrained as pretrained
    from seqarch import serving as serving
    from seqarch import state as state
    from seqarch import testing as testing
    from seqarch.checkpoints.loading import *  # noqa: F403
    from seqarch.layers import *  # noqa: F403
    from seqarch.models import *  # noqa: F403

else:

    def _exports() -> dict[str, str]:
        """By each of these names the module that it is in."""
        return {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}

    def _modules() -> list[str]:
        import pkgutil

        folders = globals()["__path__"]
        return [module.name for module in pkgutil.iter_modules(folders) if not module.name.startswith("_")]

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__all__":
            return sorted([*_exports(), *_modules()])
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
            if module := _exports().get(name):
                value = globals()[name] = getattr(importlib.import_module(module), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=__import__(__name__))

    def __dir__() -> list[str]:
        return sorted({*(name for name in globals() if name.startswith("__")), *_exports(), *_modules()})
