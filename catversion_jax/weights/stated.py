"""What a single file says of itself: in the header of a safetensors file, or by tensors that are there as a mark."""

from collections.abc import Collection, Mapping

from catversion_jax.utils.errors import UserError, listed

TYPES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v-pred": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
}
UNSAID = ("", "none", "null", "unknown")
"""Values that say nothing."""
HEADER = {
    "modelspec.prediction_type": TYPES,  # https://github.com/Stability-AI/ModelSpec, as kohya's scripts write it
    "modelspec.predict_key": TYPES,  # as ComfyUI writes it
    "ss_v_parameterization": {"true": "v_prediction", "false": "epsilon"},
}
"""Key of a safetensors header -> the meaning of its values, in lower case."""

ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
"""modelspec.architecture -> what it predicts, if nothing else says."""

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI marks v-prediction and a noise schedule rescaled to end without signal."""
ADVICE = "set config.model.prediction_type"


def stated_prediction(metadata: Mapping[str, str], names: Collection[str], path: str) -> str:
    """Returns the prediction type that a file states, or "". Raises UserError if it is unknown, or stated twice."""
    said: dict[str, str] = {}
    for key, meanings in HEADER.items():
        value = metadata.get(key, "").strip().lower()
        if value in UNSAID:
            continue
        if value not in meanings:
            raise UserError(
                f"{path}: {key}={metadata[key]!r} in its header: expected one of {', '.join(meanings)}; {ADVICE}"
            )
        said[f"{key}={value}"] = meanings[value]
    if V_PREDICTION in names:
        said[f"the tensor {V_PREDICTION}"] = "v_prediction"
    if len(set(said.values())) > 1:
        raise UserError(f"{path}: contradicts itself by {listed(said)}; {ADVICE}")
    return next(iter(said.values()), ARCHITECTURES.get(metadata.get("modelspec.architecture", ""), ""))
