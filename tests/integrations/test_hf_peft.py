"""superpose with PEFT's adapters on blocks, head and embedding, before and after, compared with plain torch."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from helpers.hf_cases import LENGTH, Rows, arguments, build, tokens
from tst_ext import reference
from tst_ext.integrations.hf import SuperpositionTrainer, fold_batch, restore, superpose

pytestmark = pytest.mark.extended

TARGETS = {
    "blocks": dict(target_modules=["q_proj", "down_proj"]),
    "head": dict(target_modules=["lm_head"]),
    "embedding": dict(target_modules=["embed_tokens"]),
    "all": dict(target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "dora": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
}


def adapted(target, order, task_type=None):
    """A model with random adapters, superposed before or after it gets them."""
    model = build("llama")
    model = superpose(model) if order == "superposed first" else model
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, task_type=task_type, **TARGETS[target])
    model = get_peft_model(model, config)
    return superpose(model) if order == "adapted first" else model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("order", ["superposed first", "adapted first"])
@pytest.mark.parametrize("target", TARGETS)
class TestLora:
    @pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
    def test_loss_and_gradients(self, target, order, task_type):
        """Compared with the model's own logits of the mean of its own embeddings; the adapters' gradients too."""
        model = adapted(target, order, task_type)
        batch = fold_batch(dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)), 3)
        embedded = model.get_input_embeddings()(batch["input_ids"].flatten(1)).unflatten(1, (4, 3)).mean(2)
        logits = model(inputs_embeds=embedded).logits
        expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(0, 1))
        loss = model(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        ours, theirs = gradients(model, loss), gradients(model, expected)
        for name, g in theirs.items():  # sums in another order, of 40 terms or so
            assert (ours[name] - g).norm() <= 1e-5 * g.norm().clamp_min(1e-3), name
        assert any("lora" in name and g.norm() > 1e-3 for name, g in ours.items())

    def test_token_ids_merging_and_restoring(self, target, order):
        model = adapted(target, order)
        ids = tokens(2, LENGTH)
        batch = fold_batch(dict(input_ids=ids, labels=ids), 3)
        loss, own = model(**batch).loss, model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(**batch).loss, loss, rtol=1e-5, atol=0)
        assert restore(model) is model and "forward" not in vars(model.get_base_model())
        assert torch.equal(model(input_ids=ids, labels=ids).loss, own)

    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_gradient_checkpointing(self, target, order, reentrant):
        """The base model is frozen, so nothing but the embedding's hook makes a reentrant checkpoint pass gradients."""
        batch = fold_batch(dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)), 3)
        model = adapted(target, order).train()
        runs = []
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        expected = gradients(model, model(**batch).loss)
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        actual = gradients(model, model(**batch).loss)
        assert len(runs) == 1 + 2
        for name, g in expected.items():
            assert (actual[name] - g).norm() <= 1e-6 * g.norm().clamp_min(1e-3), name


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_a_prompt_is_refused(tmp_path, config):
    """Its embeddings would stand before the bags; PEFT itself fails on bags, with a message about dimensions."""
    for model in (build("llama"), superpose(build("llama"))):
        model = get_peft_model(model, config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        with pytest.raises(
            ValueError, match=f"^model: expected an adapter in the model's layers, got {config.__name__}"
        ):
            SuperpositionTrainer(model, arguments(tmp_path), train_dataset=Rows(), bag_size=3, ratio=0.5)


def test_compile():
    """In one graph, bags and tokens."""
    model, ids = adapted("all", "superposed first", "CAUSAL_LM"), tokens(2, LENGTH)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (fold_batch(dict(input_ids=ids, labels=ids), 3), dict(input_ids=ids, labels=ids)):
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["superposed first", "adapted first"])
def test_trainer(tmp_path, order):
    """Only the adapters train, through both phases, and the loss of each falls."""
    model = adapted("all", order)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SuperpositionTrainer(
        model, arguments(tmp_path, max_steps=20), train_dataset=Rows(), bag_size=3, ratio=0.5
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[9] < losses[0] - 0.5 and losses[19] < losses[10] - 0.2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora" in name), name
