"""superpose and restore, on tiny models of each family of the installed transformers, on CPU."""

import copy
import io
import os
import pickle
import types

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.hf_cases import FAMILIES, LENGTH, MIXTURES, SIZES, VOCABULARY, build, tokens
from helpers.processes import in_processes, needs_gloo
from tst_ext import reference
from tst_ext.integrations.hf import fold_batch, restore, superpose


def build_gemma3n():
    sizes = dict(SIZES, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=0)
    return transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(**sizes, layer_types=["full_attention"] * 2, laurel_rank=4)
    )


def bags(bag_size=3, rows=2, length=LENGTH, seed=0):
    return fold_batch(dict(input_ids=tokens(rows, length, seed=seed), labels=tokens(rows, length, seed=seed)), bag_size)


def loss_written_out(model, batch, embedding=None):
    """In plain torch, by what the model itself makes of the mean of its tokens' embeddings: full logits."""
    embedding = embedding or model.get_input_embeddings()
    valid = (batch["input_ids"] != -100).unsqueeze(-1)
    embedded = embedding(batch["input_ids"].clamp_min(0).flatten(1)).unflatten(1, batch["input_ids"].shape[1:])
    logits = model(inputs_embeds=(embedded * valid).sum(2) / valid.sum(2)).logits
    return reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(0, 1))


def assert_gradients(actual, expected):
    """The same but for the order of sums, of some 40 terms."""
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        assert (actual[name] - g).norm() <= 2e-6 * g.norm().clamp_min(1e-3), name


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
        assert_gradients(gradients(model, loss), expected)

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

    @pytest.mark.parametrize(
        ("family", "dtype"),
        [(family, dtype) for dtype in (torch.bfloat16, torch.float16) for family in [*FAMILIES, *MIXTURES]]
        + [(family, torch.float64) for family in FAMILIES],  # the library's experts have no float64
        ids=str,
    )
    def test_models_of_other_dtypes(self, family, dtype):
        """They pass the trial, and at s = 1 the loss is the library's own but for the rounding of its logits."""
        for seed in range(3):
            model = superpose(build(family, seed).to(dtype).eval())
            ids = tokens(2, LENGTH)
            own = model(input_ids=ids, labels=ids).loss
            loss = model(**fold_batch(dict(input_ids=ids, labels=ids), 1)).loss
            eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            assert abs(loss - own) <= 2 * eps * own  # a logit errs by eps / 2 of itself, and so does a mean of them
            loss.backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.grad is not None)

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
        hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.clone())
        loss = model(**folded).loss  # with a hook the tokens are embedded one by one, and one bag is empty
        hook.remove()
        torch.testing.assert_close(model(**folded).loss, loss, rtol=1e-6, atol=0)
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

    def test_autocast_and_compile(self):
        model = superpose(build("llama"))
        batch = fold_batch(dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)), 3)
        loss = model(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**batch).loss
        assert 0 < abs(low - loss) < torch.finfo(torch.bfloat16).eps * loss  # of a mean: each logit errs by about that
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).loss, loss, rtol=1e-6, atol=0)
        of_tokens = dict(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH))  # after the switch
        own = build("llama")(**of_tokens).loss
        torch.testing.assert_close(compiled(**of_tokens).loss, own, rtol=1e-6, atol=0)
        weighted = superpose(build("llama"), position_weights="power_law")
        items = (batch["labels"] != -100).sum()
        compiled = torch.compile(weighted, backend="aot_eager", fullgraph=True)
        expected = weighted(**batch, num_items_in_batch=items).loss
        torch.testing.assert_close(compiled(**batch, num_items_in_batch=items).loss, expected, rtol=1e-6, atol=0)

    def test_arguments_that_wrappers_pass(self):
        """PEFT passes inputs_embeds=None, other loops use_cache=False: nothing changes by them."""
        model = superpose(build("llama"))
        batch = bags()
        loss = model(**batch).loss
        nothing = dict(use_cache=False, inputs_embeds=None, past_key_values=None, logits_to_keep=0, position_ids=None)
        assert torch.equal(model(**batch, **nothing, output_attentions=None, return_dict=None).loss, loss)
        as_tuple = model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], loss)
        more = model(**batch, output_hidden_states=True, output_attentions=True)
        embedded = model.get_input_embeddings()(batch["input_ids"]).mean(2)
        own = model.model(inputs_embeds=embedded, output_hidden_states=True, output_attentions=True)
        assert len(more.hidden_states) == 3 and len(more.attentions) == 2
        for ours, theirs in zip(more.hidden_states + more.attentions, own.hidden_states + own.attentions, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("inputs_embeds", torch.ones(2, 4, 32)),
            ("past_key_values", object()),
            ("use_cache", True),
            ("logits_to_keep", 2),
        ],
    )
    def test_arguments_that_mean_something_else_are_named(self, argument, value):
        model = superpose(build("llama"))
        with pytest.raises(ValueError, match=f"^{argument}: expected nothing with bags"):
            model(**bags(), **{argument: value})

    @pytest.mark.parametrize("family", MIXTURES)
    @pytest.mark.parametrize("by", ["config", "argument"])
    def test_the_routers_loss(self, family, by):
        """Bags of one: the library's own loss, with its router's. Bags: the router's loss of what the bags went to."""
        model = build(family, output_router_logits=by == "config").eval()
        given = {} if by == "config" else dict(output_router_logits=True)
        ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.int64)
        mask[0, 5:] = 0
        batch = dict(input_ids=ids, labels=torch.where(mask == 1, ids, -100), attention_mask=mask)
        own = model(**batch, **given)
        expected = gradients(model, own.loss)
        superpose(model)
        ours = model(**fold_batch(batch, 1), **given)
        torch.testing.assert_close(ours.loss, own.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.aux_loss, own.aux_loss, rtol=1e-6, atol=0)
        assert_gradients(gradients(model, ours.loss), expected)

        folded = bags(rows=3)
        ours = model(**folded, **given)
        embedded = model.get_input_embeddings()(folded["input_ids"]).mean(2)
        aux = model(inputs_embeds=embedded, output_router_logits=True).aux_loss
        torch.testing.assert_close(ours.aux_loss, aux, rtol=1e-6, atol=0)
        assert len(ours.router_logits) == 2 and ours.router_logits[0].shape == (12, 4)
        without = model(**folded, output_router_logits=False)
        torch.testing.assert_close(ours.loss, without.loss + 0.5 * aux, rtol=1e-6, atol=0)
        assert "aux_loss" not in without

    def test_copies(self):
        """Copies and pickles read bags too, by their own weights."""
        model, batch = superpose(build("llama"), position_weights="power_law"), bags()
        loss, file = model(**batch).loss, io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(other(**batch).loss, loss)
            with torch.no_grad():
                other.lm_head.weight.zero_()
            assert not torch.equal(other(**batch).loss, loss) and torch.equal(model(**batch).loss, loss)
            restore(other)
            assert "forward" not in vars(other)

    def test_superposed_again(self):
        """The last options hold, and one restore undoes both."""
        model, batch = superpose(build("llama")), bags()
        loss = model(**batch).loss
        superpose(model, objective="mce_alt")
        assert not torch.equal(model(**batch).loss, loss)
        assert torch.equal(superpose(model)(**batch).loss, loss)
        assert "forward" not in vars(restore(model))

    def test_a_forward_that_another_library_has_patched(self):
        """As Liger Kernel patches an instance: token ids go there, and restore leaves it as it was."""
        model = build("llama")
        model.forward = types.MethodType(_patched_forward, model)
        ids = tokens(2, 4)
        superpose(model)
        assert model(ids).logits.eq(model(input_ids=ids).logits).all() and model.patched == 4  # two of them on trial
        assert model(**bags()).loss.isfinite() and model.patched == 4
        assert restore(model).forward.__func__ is _patched_forward

    def test_the_trial_allows_logits_that_autocast_rounds(self, bfloat16_gemms):
        model = build("llama")
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        with torch.autocast("cpu", torch.bfloat16):
            superpose(model)

    def test_bad_loss_options_are_named_at_once(self):
        model = build("llama")
        weights = torch.nn.Parameter(torch.ones(3))
        for options, message in (
            (dict(position_weights=weights), "^position_weights: expected a constant tensor.*requires_grad=True"),
            (dict(position_weights="linear"), "^position_weights: expected"),
            (dict(objective="mcee"), "^objective: expected"),
            (dict(z_loss=-1.0), "^z_loss: expected"),
        ):
            with pytest.raises(ValueError, match=message):
                superpose(model, **options)
            assert "forward" not in vars(model)

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing when")  # ids have no gradient
    @pytest.mark.parametrize("tied", [False, True])
    def test_hooks(self, tied):
        """Hooks on embedding and head are run: they change the loss of bags as they change the loss of tokens."""
        batch = bags()
        model = superpose(build("llama_tied" if tied else "llama"))
        embedding, head, calls = model.get_input_embeddings(), model.get_output_embeddings(), []
        plain = model(**batch).loss
        double = embedding.register_forward_hook(lambda module, inputs, output: 2 * output)
        expected = loss_written_out(model, batch)
        assert abs(expected - plain) > 1e-3
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=0)
        double.remove()
        halve = head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
        capture = head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
        torch.testing.assert_close(model(**batch).loss, loss_written_out(model, batch), rtol=1e-5, atol=0)
        assert calls == [(2, 4, VOCABULARY)] * 2
        halve.remove()
        capture.remove()
        embedding.register_full_backward_pre_hook(lambda module, outputs: calls.append("backward"))
        loss = model(**batch).loss
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        loss.backward()
        assert calls[2:] == ["backward"]

    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    def test_another_head_is_called_as_it_is(self, before, caplog):
        """A head that is not linear: logits are formed, and a warning says so."""
        model, batch = build("llama"), bags()
        model = model if before else superpose(model)
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softplus())
        if before:
            superpose(model)
        torch.testing.assert_close(model(**batch).loss, loss_written_out(model, batch), rtol=1e-5, atol=0)

    def test_float8(self):
        """torchao exchanges every nn.Linear after superpose: the head computes in float8, and its loss stays TST's."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        batch = bags(4, rows=4, length=64)  # sizes that float8 takes: multiples of 16
        for name in ("input_ids", "labels"):
            batch[name] = torch.where(batch[name] < 0, -100, batch[name] % 96)
        model = superpose(build("llama", vocab_size=96, num_hidden_layers=1))
        loss = model(**batch).loss
        convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
        assert type(model.lm_head).__name__ == "Float8Linear"
        low = model(**batch).loss
        torch.testing.assert_close(low, loss_written_out(model, batch), rtol=1e-5, atol=0)
        # Weights and activations are rounded to 3 bits of mantissa; independently, so that the mean errs far less.
        assert 0 < abs(low - loss) < 2**-4 * loss
        low.backward()
        assert model.lm_head.weight.grad.norm() > 0 and model.model.embed_tokens.weight.grad.norm() > 0

    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    def test_quantised_weights(self, before):
        """torchao's quantize_ leaves an nn.Linear with a weight of another kind, which only F.linear understands."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        batch, model = bags(), build("llama")
        model = model if before else superpose(model)
        loss = superpose(build("llama"))(**batch).loss
        quantize_(model, Int8WeightOnlyConfig())
        assert type(model.lm_head) is torch.nn.Linear
        model = superpose(model) if before else model
        low = model(**batch).loss
        torch.testing.assert_close(low, loss_written_out(model, batch), rtol=1e-5, atol=0)
        assert 0 < abs(low - loss) < 2**-7 * loss  # 8 bits of the largest weight of a row

    def test_options_of_an_embedding(self):
        """Those that a bag's kernel does not know are the embedding's own."""
        for options in (dict(max_norm=0.05), dict(scale_grad_by_freq=True), dict(sparse=True)):
            model, batch = superpose(build("llama")), bags()
            plain = gradients(model, model(**batch).loss)
            embedding = torch.nn.Embedding(VOCABULARY, 32, _weight=model.model.embed_tokens.weight.detach(), **options)
            model.set_input_embeddings(embedding)
            loss = model(**batch).loss
            actual = gradients(model, loss)["model.embed_tokens.weight"]
            expected = loss_written_out(model, batch)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            expected = gradients(model, expected)["model.embed_tokens.weight"]
            assert actual.is_sparse == expected.is_sparse
            actual, expected = (g.to_dense() if g.is_sparse else g for g in (actual, expected))
            assert (actual - expected).norm() <= 1e-5 * expected.norm()
            assert options == dict(sparse=True) or (actual - plain["model.embed_tokens.weight"]).norm() > 1e-3

    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    @pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    @pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.extended)])
    def test_gradient_checkpointing(self, family, reentrant, frozen, before):
        """Gradients of both phases are those without, also where the embedding is frozen."""
        runs = []
        for checkpointing in (False, True):
            model = build(
                family, **(dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) if family == "gpt2" else {})
            ).train()
            if frozen:
                model.get_input_embeddings().weight.requires_grad_(False)
            if not before:
                superpose(model)
            if checkpointing:
                model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            if before:
                superpose(model)
            counted = _count_checkpoints(model)
            batch, ids = bags(), tokens(2, LENGTH)
            of_bags = gradients(model, model(**batch).loss)
            of_tokens = gradients(model, model(input_ids=ids, labels=ids).loss)
            runs.append((of_bags, of_tokens, len(counted)))
        assert runs[1][2] == 2 * 2 * 2 and runs[0][2] == 2 * 2  # layers are run again, in either phase
        for k in (0, 1):
            assert len(runs[0][k]) >= len(list(model.parameters())) - 2 * frozen
            assert_gradients(runs[1][k], runs[0][k])

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
            (
                lambda: transformers.LlamaModel(FAMILIES["llama"]),
                "expected a decoder.*under an output head, got LlamaModel",
            ),
            (
                lambda: transformers.JetMoeForCausalLM(
                    transformers.JetMoeConfig(**SIZES, num_local_experts=2, output_router_logits=True)
                ),
                "the router's loss of JetMoeForCausalLM",
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
        with pytest.raises(ValueError, match=f"^model: .*{message}") as raised:
            superpose(model)
        assert str(raised.value).count("model: ") == 1 and "forward" not in vars(model)

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


def _patched_forward(self, *args, **kwargs):
    self.patched = getattr(self, "patched", 0) + 1
    return type(self).forward(self, *args, **kwargs)


def _count_checkpoints(model):
    """A list that grows with each run of a layer's MLP."""
    counted = []
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: counted.append(1))
    return counted


def _double_embeddings(module, args, kwargs):
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = 2 * kwargs["inputs_embeds"]
    return args, kwargs


def _capped(output):
    output.logits = 20 * torch.tanh(output.logits / 20)
    return output


def check_fsdp(rank):
    """FSDP2 with units of layers and one for the rest, also of embedding and head: two processes share the batch."""
    mesh = init_device_mesh("cpu", (2,))
    for own_units in (False, True):
        check_sharded(rank, mesh, own_units)


def check_sharded(rank, mesh, own_units):
    family = "llama" if own_units else "llama_tied"
    batch = fold_batch(dict(input_ids=tokens(4, LENGTH), labels=tokens(4, LENGTH)), 3)
    items = (batch["labels"] != -100).sum()
    one = superpose(build(family))
    expected = gradients(one, one(**batch, num_items_in_batch=items).loss)
    model = superpose(build(family))
    for module in (*model.model.layers, *([model.model.embed_tokens, model.lm_head] if own_units else []), model):
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


def check_accelerate(rank):
    """A loop of one's own under accelerate's DDP: gradients of the whole batch, whatever is superposed when."""
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, ACCELERATE_USE_CPU="true")
    os.environ.update({name: str(value) for name, value in environment.items()})
    batch = bags(rows=4)
    share = {name: t[2 * rank : 2 * rank + 2] for name, t in batch.items()}
    items = (batch["labels"] != -100).sum()
    for precision in ("no", "bf16"):
        for checkpointing in (False, True):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(mixed_precision=precision)
            assert accelerator.num_processes == 2
            one, model = superpose(build("llama")), superpose(build("llama")).train()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = one(**batch, num_items_in_batch=items).loss
            expected = gradients(one, loss)
            if checkpointing:
                model.gradient_checkpointing_enable()
            prepared = accelerator.prepare(model)
            accelerator.backward(prepared(**share, num_items_in_batch=items / 2).loss)
            for name, p in accelerator.unwrap_model(prepared).named_parameters():
                # In bfloat16 each half of the batch is rounded once more, to 8 bits.
                tolerance = 2e-6 if precision == "no" else torch.finfo(torch.bfloat16).eps
                assert (p.grad - expected[name]).norm() <= tolerance * expected[name].norm().clamp_min(1e-3), name
            if precision == "bf16":
                check_wrapped(accelerator, accelerator.unwrap_model(prepared), batch)


def check_wrapped(accelerator, model, batch):
    """accelerate's autocast stays around bags when a model is superposed again; a model that never was is refused."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = superpose(build("llama"), objective="mce_alt")(**batch).loss
    assert torch.equal(superpose(model, objective="mce_alt")(**batch).loss, expected)
    with pytest.raises(ValueError, match="nothing around it: accelerator.unwrap_model"):
        restore(model)
    with pytest.raises(ValueError, match="^model: accelerate has wrapped the forward of LlamaForCausalLM.*before"):
        superpose(accelerator.prepare(build("llama")).module)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    exact = superpose(build("llama"), objective="mce_alt")(**batch).loss
    torch.testing.assert_close(model(**batch).loss, exact, rtol=1e-6, atol=0)
    assert "forward" not in vars(restore(superpose(model)))


@pytest.mark.extended
@needs_gloo
def test_accelerate(tmp_path):
    in_processes(2, check_accelerate, tmp_path)
