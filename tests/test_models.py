"""Loading models and tokenizers: one-line errors, and Transformers' settings as they were."""

import pytest

from kdecs.errors import ModelError

transformers = pytest.importorskip("transformers")


def test_what_cannot_be_loaded_is_one_line_and_the_noise_comes_back(tmp_path):
    from transformers.utils import logging

    from kdecs.models import load_pretrained, load_tokenizer

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    for reference in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelError, match=f"tokenizer {reference}: cannot be loaded: ") as caught:
            load_tokenizer(reference)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError, match=f"model {reference}: cannot be loaded as causal: ") as caught:
            load_pretrained(transformers.AutoModelForCausalLM, reference, "causal")
        assert "\n" not in str(caught.value)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
