"""Log-probs of the patched engine against transformers and peft with the same adapter, as an independent reference."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.host

# Both compute in float32 (eps 6e-8). A dot product of K <= 704 random terms errs by about sqrt(K) eps = 1.6e-6 of its
# size, and some 20 of them follow each other from the embedding to the head, each adding its error to activations of
# unit size: 3e-5 at the logits, which are of unit size as well; three times that for the largest of a few thousand.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def peft_model(checkpoint):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    model, adapters = checkpoint
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    (first, path), *others = adapters.items()
    wrapped = peft.PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, path in others:
        wrapped.load_adapter(path, adapter_name=name)
    return wrapped


def logprobs(peft_model, adapter: str | None, ids: list[int]) -> torch.Tensor:
    """Log-probs [tokens, vocabulary] of the token after each of `ids`."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        if adapter is None:
            with peft_model.disable_adapter():
                logits = peft_model(tokens).logits
        else:
            peft_model.set_adapter(adapter)
            logits = peft_model(tokens).logits
    return logits[0].log_softmax(-1)


def test_logprobs_of_the_patched_engine_equal_peft(lifecycle, peft_model):
    """The best tokens at every position, of every request, along the tokens that the engine chose."""
    errors: dict[str | None, list[float]] = {}
    for request in lifecycle["patched"]["requests"]:
        prompt, tokens = request["prompt_ids"], request["tokens"]
        expected = logprobs(peft_model, request["adapter"], prompt + tokens[:-1])[len(prompt) - 1 :]
        assert expected.argmax(-1).tolist() == tokens
        for row, best in zip(expected, request["logprobs"], strict=True):
            for token, value in best.items():
                errors.setdefault(request["adapter"], []).append(abs(row[int(token)].item() - value))
    worst = {adapter: float(np.max(found)) for adapter, found in errors.items()}
    assert len(worst) == 4
    assert all(error <= TOLERANCE for error in worst.values()), worst
