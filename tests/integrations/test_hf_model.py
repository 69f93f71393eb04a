"""superpose and restore, on tiny models of each family of the installed transformers, on CPU."""

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.hf_cases import FAMILIES, LENGTH, SIZES, VOCABULARY, build, tokens
from helpers.processes import in_processes, needs_gloo
from tst_ext import reference
from tst_ext.integrations.hf import fold_batch, restore, superpose


def build_gemma3n():
    sizes = dict(SIZES, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
    return transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(**sizes, layer_types=["full_attention"] * 2, laurel_rank=4)
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestSuperpose:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bags_of_one_are_the_librarys_own_loss(self, family):
        model = build(family).eval()  # without GPT-2's dropout
        ids = tokens(3, LENGTH)
        labels = ids.clone()
        labels[0, 5:] = -100
        own = model(input_ids=ids, labels=labels).loss
        expected = gradients(model, own)
        superpose(model)
        loss = model(**fold_batch(dict(input_ids=ids, labels=labels), 1)).loss
        torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)
        actual = gradients(model, loss)
        assert actual.keys() == expected.keys()
        # The library gathers rows of the table and rounds elsewhere: sums in another order, of 40 terms or so.
        for name, g in expected.items():
            assert (actual[name] - g).norm() <= 2e-6 * g.norm().clamp_min(1e-3), name

    @pytest.mark.parametrize("family", FAMILIES)
    def test_bags(self, family):
        """As written out in plain torch: the mean of the scaled embeddings, full logits, a cross-entropy a position."""
        model = build(family).eval()
        superpose(model, position_weights="power_law")
        batch = fold_batch(dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)), 3)
        embedding = model.get_input_embeddings()
        hidden = model.base_model(inputs_embeds=embedding(batch["input_ids"]).mean(2)).last_hidden_state
        head = model.get_output_embeddings()
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        weights = 1 / torch.arange(1, 4)
        expected = reference.multi_hot_cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(0, 1), position_weights=weights
        )
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=0)

    def test_num_items_in_batch_is_the_normalizer(self):
        model = superpose(build("llama"))
        batch = fold_batch(dict(input_ids=tokens(4, LENGTH), labels=tokens(4, LENGTH)), 3)
        items = (batch["labels"] != -100).sum()
        whole = model(**batch, num_items_in_batch=items).loss
        parts = [model(**{k: t[i : i + 1] for k, t in batch.items()}, num_items_in_batch=items).loss for i in range(4)]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)

    def test_padding_counts_nowhere(self):
        model = superpose(build("llama").eval())
        ids = tokens(2, LENGTH)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        batch = dict(input_ids=ids, labels=torch.where(mask == 1, ids, -100), attention_mask=mask)
        folded = fold_batch(batch, 3)
        assert folded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        other = fold_batch({**batch, "input_ids": torch.where(mask == 1, ids, 5)}, 3)
        assert torch.equal(model(**folded).loss, model(**other).loss)
        mask[1] = torch.arange(LENGTH) >= 4  # on the left, where later bags read it
        left = dict(input_ids=ids, labels=torch.where(mask == 1, ids, -100), attention_mask=mask)
        loss = model(**fold_batch(left, 3)).loss
        changed = fold_batch({**left, "input_ids": torch.where(mask == 1, ids, 5)}, 3)
        assert torch.equal(model(**changed).loss, loss)
        short = fold_batch(dict(input_ids=ids[1:, :7], labels=ids[1:, :7]), 3)  # the row without its padding
        assert short["input_ids"].shape == (1, 3, 3)
        own = model(**{k: t[1:] for k, t in folded.items()}).loss
        torch.testing.assert_close(model(**short).loss, own, rtol=1e-5, atol=0)

    def test_token_ids_go_the_models_own_way(self, tmp_path):
        model, plain = superpose(build("gemma2")).eval(), build("gemma2").eval()
        ids = tokens(2, LENGTH)
        for a, b in zip(model(input_ids=ids, labels=ids)[:2], plain(input_ids=ids, labels=ids)[:2], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, plain)))
        model.save_pretrained(tmp_path / "a")
        plain.save_pretrained(tmp_path / "b")
        for file in (tmp_path / "b").iterdir():
            assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
        assert type(restore(model)) is type(plain) and "forward" not in vars(model)
        with pytest.raises(ValueError, match="^model: expected one that superpose has been applied to"):
            restore(model)

    def test_autocast_and_checkpointing_and_compile(self):
        model = superpose(build("llama"))
        batch = fold_batch(dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)), 3)
        loss = model(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**batch).loss
        assert 0 < abs(low - loss) < torch.finfo(torch.bfloat16).eps * loss  # of a mean: each logit errs by about that
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).loss, loss, rtol=1e-6, atol=0)
        weighted = superpose(build("llama"), position_weights="power_law")
        items = (batch["labels"] != -100).sum()
        compiled = torch.compile(weighted, backend="aot_eager", fullgraph=True)
        expected = weighted(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(compiled(**batch, num_items_in_batch=items).loss, expected, rtol=1e-6, atol=0)
        model.gradient_checkpointing_enable()
        assert torch.equal(model.train()(**batch).loss, loss)

    @pytest.mark.parametrize(
        ("build_model", "message"),
        [
            (
                lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES)),
                "head of CohereForCausalLM does",
            ),
            (
                lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=2.0)),
                "head of GraniteForCausalLM does more",
            ),
            (
                lambda: transformers.BertLMHeadModel(
                    transformers.BertConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, is_decoder=True)
                ),
                "BertLMHeadModel.*does more than hidden @ weight.T",
            ),
            (lambda: transformers.LlamaModel(FAMILIES["llama"]), "expected a decoder under a head.*LlamaModel"),
            (
                lambda: transformers.MixtralForCausalLM(
                    transformers.MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True)
                ),
                "router's loss of MixtralForCausalLM",
            ),
            (
                lambda: transformers.XLNetLMHeadModel(
                    transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)
                ),
                "XLNetLMHeadModel is not causal",
            ),
            (lambda: build_gemma3n(), "Gemma3nForCausalLM looks up token ids in every layer"),
        ],
        ids=["scaled head", "divided head", "transformed head", "no head", "router", "two-way", "ids in layers"],
    )
    def test_what_does_not_fit_is_named(self, build_model, message):
        model = build_model()
        with pytest.raises(ValueError, match=f"^model: .*{message}"):
            superpose(model)
        assert "forward" not in vars(model)

    def test_a_softcap_by_another_name_is_found(self, monkeypatch):
        model = build("gemma2")
        monkeypatch.setattr(model.config, "final_logit_softcapping", None)
        own = type(model).forward
        forward = lambda self, *a, **k: _capped(own(self, *a, **k))  # noqa: E731
        monkeypatch.setattr(type(model), "forward", forward)
        with pytest.raises(ValueError, match="does more than hidden"):
            superpose(model)

    def test_other_heads_and_inputs_are_named(self):
        model = build("llama")
        model.lm_head = torch.nn.Sequential(model.lm_head)
        with pytest.raises(ValueError, match="^model: expected an output head of type nn.Linear, got Sequential"):
            superpose(model)
        model = build("llama")
        hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(ValueError, match="expected no hooks on the embedding of LlamaForCausalLM"):
            superpose(model)
        hook.remove()
        model.model.register_forward_pre_hook(_double_embeddings, with_kwargs=True)
        with pytest.raises(ValueError, match="does not compute the same from inputs_embeds"):
            superpose(model)
        model = build("llama")
        model.hf_device_map = {"model": 0, "lm_head": 1}
        with pytest.raises(ValueError, match="expected LlamaForCausalLM on one device"):
            superpose(model)
        model = build("llama")
        model.forward = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match="expected the forward of LlamaForCausalLM, or a method.*got function"):
            superpose(model)
        with pytest.raises(TypeError, match="^model: expected a transformers PreTrainedModel.*got DataParallel"):
            superpose(torch.nn.DataParallel(build("llama")))
        with pytest.raises(TypeError, match=r"^superpose: expected loss options among .*got \['normalizer'\]"):
            superpose(build("llama"), normalizer=3)
        with pytest.raises(TypeError, match="^with bags the arguments after input_ids must be keywords"):
            superpose(build("llama"))(tokens(2, 4, 3), torch.ones(2, 4), labels=tokens(2, 4, 3))
        with pytest.raises(ValueError, match=r"^labels: expected those of the bags, shape \(2, 4, 3\), got \(2, 12\)"):
            superpose(build("llama"))(input_ids=tokens(2, 4, 3), labels=tokens(2, 12))

    def test_trying_the_model_out_leaves_no_trace(self):
        model = build("gpt2").train()
        model.transformer.h[0].eval()
        before = {name: m.training for name, m in model.named_modules()}
        state = torch.get_rng_state()
        superpose(model)
        assert {name: m.training for name, m in model.named_modules()} == before
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m._forward_hooks for m in model.modules())


def _double_embeddings(module, args, kwargs):
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = 2 * kwargs["inputs_embeds"]
    return args, kwargs


def _capped(output):
    output.logits = 20 * torch.tanh(output.logits / 20)
    return output


def check_fsdp(rank):
    """FSDP2 with a unit a layer and one for the rest: each of two processes has its share of the batch."""
    mesh = init_device_mesh("cpu", (2,))
    batch = fold_batch(dict(input_ids=tokens(4, LENGTH), labels=tokens(4, LENGTH)), 3)
    items = (batch["labels"] != -100).sum()
    one = superpose(build("llama_tied"))
    expected = gradients(one, one(**batch, num_items_in_batch=items).loss)
    model = superpose(build("llama_tied"))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    share = {name: t[2 * rank : 2 * rank + 2] for name, t in batch.items()}
    model(**share, num_items_in_batch=items / 2).loss.backward()  # FSDP2 averages over the processes
    for name, parameter in model.named_parameters():
        g = expected[name]
        assert (parameter.grad.full_tensor() - g).norm() <= 2e-6 * g.norm().clamp_min(1e-3), name


@pytest.mark.extended
@needs_gloo
def test_fsdp(tmp_path):
    in_processes(2, check_fsdp, tmp_path)
