"""An SAE that says how it was trained is evaluated on the same side of the same split, with the same masks."""

from unweave.activations import DataConfig, MaskConfig
from unweave.evaluation.sample import default_data_config, default_masks
from unweave.sae import SAE, ReLU


def sae_with(**metadata):
    return SAE(4, 8, ReLU(), metadata=metadata)


def test_settings_of_the_training():
    """pitfall_240: what training held out is held out in evaluation, without being said again."""
    sae = sae_with(
        text={"context": 64, "held_out": 0.01, "bos": False, "a_setting_of_the_future": 1},
        masks={"norm_multiple": None, "positions": "1:", "special_tokens": False, "token_ids": [3]},
        context_size=64,
        prepend_bos=False,
    )
    assert default_data_config(sae) == DataConfig(context=64, held_out=0.01, bos=False)
    assert default_masks(sae) == MaskConfig(norm_multiple=None, positions="1:", special_tokens=False, token_ids=[3])


def test_files_of_others():
    """SAELens' files say less: the context, BOS and positions."""
    sae = sae_with(context_size=32, prepend_bos=False, seqpos_slice=[2, None])
    assert default_data_config(sae) == DataConfig(context=32, bos=False)
    assert default_masks(sae) == MaskConfig(positions="2:")
    assert default_data_config(sae_with()) == DataConfig()
    assert default_masks(sae_with(seqpos_slice=[None])) == MaskConfig()
