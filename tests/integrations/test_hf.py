"""tst_ext.integrations.hf beside the installed transformers: tiny models of each family, on CPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer

from helpers.hf_cases import FAMILIES, LENGTH, SIZES, VOCABULARY, Rows, arguments, build, tokens
from helpers.processes import in_processes, needs_gloo
from tst_ext import SuperpositionSchedule, fold_inputs, fold_labels, reference
from tst_ext.integrations.hf import SuperpositionTrainer, fold_batch, restore, superpose


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
            (lambda: build_gemma3n(), "Gemma3nForCausalLM looks ids up in every layer"),
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


class TestFoldBatch:
    def test_no_target_is_visible_to_its_bag(self):
        ids = torch.arange(1, 25).view(2, 12)
        folded = fold_batch(dict(input_ids=ids, labels=ids), 4)
        assert torch.equal(folded["input_ids"], fold_inputs(ids, 4))
        assert torch.equal(folded["labels"], fold_labels(ids, 4, shifted=False))
        assert folded["labels"][0].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [-100] * 4]
        assert folded["shift_labels"] is folded["labels"]

    @pytest.mark.parametrize("extra", [dict(position_ids=None), dict(token_type_ids=None)])
    def test_other_tensors_are_named(self, extra):
        ids = tokens(2, 4)
        with pytest.raises(ValueError, match=f"^batch: expected input_ids, labels.*{next(iter(extra))}"):
            fold_batch(dict(input_ids=ids, labels=ids, **extra), 2)
        with pytest.raises(ValueError, match=r"^batch: .*got \['input_ids'\]"):
            fold_batch(dict(input_ids=ids), 2)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


class Recorder(SuperpositionTrainer):
    """Keeps what each micro-batch was."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


def losses(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


class TestTrainer:
    def test_two_phases(self, tmp_path):
        model = build("llama")
        model.get_output_embeddings().weight.data.mul_(0.01)  # near uniform at first
        trainer = Recorder(model, arguments(tmp_path, max_steps=40), train_dataset=Rows(), bag_size=3, ratio=0.4)
        trainer.train()
        assert [tuple(s["input_ids"].shape) for s in trainer.seen] == [(2, LENGTH, 3)] * 16 + [(2, LENGTH)] * 24
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["bag_size"] for entry in history] == [3] * 16 + [1] * 24
        uniform = torch.tensor(float(VOCABULARY)).log()
        assert abs(history[0]["loss"] - uniform) < 0.05
        assert history[15]["loss"] < uniform - 1 and history[-1]["loss"] < history[16]["loss"] - 0.5

    @pytest.mark.parametrize(
        ("loss_options", "expected"),
        [
            (dict(position_weights="power_law"), math.log(VOCABULARY)),
            (dict(position_weights=torch.tensor([5.0, 0.0, 1.0])), math.log(VOCABULARY)),
            (dict(objective="mce_alt"), math.log(VOCABULARY / 3)),  # three labels of a bag, all different
        ],
    )
    def test_the_first_loss_is_that_of_chance(self, tmp_path, loss_options, expected):
        model = build("llama")
        model.get_output_embeddings().weight.data.mul_(1e-3)
        options = dict(max_steps=2, gradient_accumulation_steps=2)
        trainer = SuperpositionTrainer(
            model, arguments(tmp_path, **options), train_dataset=Rows(), bag_size=3, ratio=1, loss_options=loss_options
        )
        trainer.train()
        assert losses(trainer)[0][1] == pytest.approx(expected, abs=0.03)

    def test_columns(self, tmp_path):
        """What the model does not take is left out, as by transformers' own Trainer; or refused by name."""
        rows = [dict(Rows()[i], text="words", number=i) for i in range(40)]
        for data in (rows, datasets.Dataset.from_list(rows)):
            trainer = SuperpositionTrainer(
                build("llama"), arguments(tmp_path), train_dataset=data, bag_size=3, ratio=0.5
            )
            trainer.train()
            assert len(losses(trainer)) == 10
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, remove_unused_columns=False), train_dataset=rows, bag_size=3, ratio=0.5
        )
        with pytest.raises(TypeError, match=r"^train_dataset: expected a list or tensor as '(text|number)', got"):
            trainer.train()

    def test_accumulation_and_bfloat16(self, tmp_path):
        """Micro-batches add up to the whole batch, in both phases, by the labels that count."""
        runs = []
        for size, accumulation in ((4, 1), (1, 4)):
            options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
            trainer = Recorder(
                build("llama"), arguments(tmp_path, **options), train_dataset=Rows(), bag_size=3, ratio=0.5
            )
            trainer.train()
            runs.append((losses(trainer), torch.cat([s["input_ids"].flatten() for s in trainer.seen])))
        assert torch.equal(runs[0][1], runs[1][1])
        torch.testing.assert_close(*(torch.tensor(run) for run, _ in runs), rtol=1e-4, atol=0)
        low = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, bf16=True), train_dataset=Rows(), bag_size=3, ratio=0.5
        )
        low.train()
        first = (losses(low)[0][1], runs[0][0][0][1])
        assert first[0] != first[1] and abs(first[0] - first[1]) < torch.finfo(torch.bfloat16).eps * first[1]

    def test_after_the_switch_it_is_an_ordinary_run(self, tmp_path):
        """From the checkpoint of the switch, transformers' own Trainer gets the same weights."""
        rows = Rows()
        options = dict(save_strategy="steps", save_steps=4, train_sampling_strategy="sequential")
        trainer = Recorder(build("qwen3"), arguments(tmp_path, **options), train_dataset=rows, bag_size=3, ratio=0.4)
        trainer.train()
        read = 4 * 2 * 3  # rows of the 4 steps of 2 samples of 3 rows
        # The Trainer skips what its steps would have read, 8 rows, and has to find the rest after them.
        rest = torch.utils.data.Subset(rows, [0] * 8 + list(range(read, read + 12)))
        plain = Trainer(build("qwen3"), arguments(tmp_path, **options), train_dataset=rest)
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert losses(plain)[4:] == losses(trainer)[4:] and len(losses(trainer)) == 10
        for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(a, b)
        trainer.save_model(str(tmp_path / "out"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
        ids = tokens(1, LENGTH)
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)

    @pytest.mark.parametrize("stop", [2, 7], ids=["superposition", "recovery"])
    @pytest.mark.parametrize("data", [Rows, lambda: Stream(Rows())], ids=["map", "iterable"])
    def test_goes_on_from_a_checkpoint(self, tmp_path, stop, data):
        options = dict(save_strategy="steps", save_steps=stop)
        whole = Recorder(build("gpt2"), arguments(tmp_path, **options), train_dataset=data(), bag_size=3, ratio=0.5)
        whole.train()
        again = Recorder(
            build("gpt2", seed=9), arguments(tmp_path, **options), train_dataset=data(), bag_size=3, ratio=0.5
        )
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert losses(again) == losses(whole) and len(again.seen) == 10 - stop
        for a, b in zip(again.seen, whole.seen[stop:], strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])

    def test_every_row_is_read_once_a_pass_and_bags_are_of_neighbours(self, tmp_path):
        ids = torch.arange(3, 3 + 90).view(30, 3)
        rows = [dict(input_ids=row, labels=row) for row in ids]
        trainer = Recorder(
            build("llama"),
            arguments(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2, learning_rate=0),
            train_dataset=rows,
            bag_size=3,
            ratio=0.5,
        )
        trainer.train()
        # Two passes are 60 rows; a step reads 2 * 3 rows or 2, on average 4.
        assert trainer.state.max_steps == 15 and trainer.schedule == SuperpositionSchedule(15, 0.5, 3)
        switch = trainer.schedule.switch_step
        assert switch == 8
        bags = torch.cat([s["input_ids"] for s in trainer.seen[:switch]])  # [16, 3, 3]
        assert torch.equal(bags[:, 1:, 0], bags[:, :-1, 0] + 3)  # rows of a sample are neighbours
        singles = torch.cat([s["input_ids"] for s in trainer.seen[switch:]])  # [14, 3]
        assert (singles[1:, 0] == singles[:-1, 0] + 3).sum() < 5  # in groups of 3 it would be 8
        read = torch.cat([bags.flatten(0, 1)[:, 0], singles[:, 0]])
        assert sorted(read[:30].tolist()) == ids[:, 0].tolist()  # the first pass
        assert sorted(read[30:60].tolist()) == ids[:, 0].tolist()  # the second, in which the phases change
        assert read[:30].tolist() != sorted(read[:30].tolist())

    def test_logs_do_not_mix_the_phases(self, tmp_path):
        each = SuperpositionTrainer(build("llama"), arguments(tmp_path), train_dataset=Rows(), bag_size=3, ratio=0.5)
        each.train()
        some = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, logging_steps=4), train_dataset=Rows(), bag_size=3, ratio=0.5
        )
        some.train()
        by_step = dict(losses(each))
        assert [step for step, _ in losses(some)] == [4, 5, 8]
        assert losses(some)[1][1] == pytest.approx(by_step[5], abs=1e-4)
        assert losses(some)[2][1] == pytest.approx(sum(by_step[i] for i in (6, 7, 8)) / 3, abs=1e-4)

    def test_evaluation_is_next_token_in_both_phases(self, tmp_path):
        model, rows = build("llama"), Rows(8)
        options = dict(eval_strategy="steps", eval_steps=1, max_steps=2, learning_rate=0.0)
        trainer = SuperpositionTrainer(
            model, arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows, bag_size=3, ratio=0.5
        )
        trainer.train()
        own = restore(model).eval()(input_ids=rows.ids, labels=rows.ids).loss.item()
        found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert found == pytest.approx([own, own], rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "changes", "message"),
        [
            (dict(label_smoothing_factor=0.1), {}, "^label_smoothing_factor: "),
            (dict(train_sampling_strategy="group_by_length"), {}, "^train_sampling_strategy: .*group_by_length"),
            (dict(ignore_data_skip=True), {}, "^ignore_data_skip: "),
            (dict(neftune_noise_alpha=5.0), {}, "^neftune_noise_alpha: "),
            (dict(dataloader_num_workers=1), dict(train_dataset=Stream(Rows())), "^dataloader_num_workers: "),
            (dict(accelerator_config=dict(split_batches=True)), {}, "^accelerator_config: .*split_batches"),
            ({}, dict(compute_loss_func=lambda *a, **k: 0), "^compute_loss_func: "),
            ({}, dict(model_init=lambda: build("llama"), model=None), "^model_init: "),
            ({}, dict(bag_size=0), "^bag_size: expected"),
            ({}, dict(ratio=1.5), "^ratio: expected"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_work_is_refused_at_once(self, tmp_path, options, changes, message):
        given = dict(model=build("llama"), train_dataset=Rows(), bag_size=3, ratio=0.5) | changes
        with pytest.raises(ValueError, match=message):
            SuperpositionTrainer(args=arguments(tmp_path, **options), **given)
        assert given["model"] is None or "forward" not in vars(given["model"])

    def test_too_few_rows(self, tmp_path):
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path), train_dataset=Rows(2), bag_size=3, ratio=0.5
        )
        with pytest.raises(ValueError, match="^train_dataset: expected at least bag_size = 3 rows, got 2"):
            trainer.train()
        assert len(trainer.train_dataset) == 2

    def test_a_second_run_counts_its_own_rows(self, tmp_path):
        options = dict(max_steps=-1, num_train_epochs=1)
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, **options), train_dataset=Rows(16), bag_size=3, ratio=0.5
        )
        steps = []
        for rows in (16, 32):
            trainer.train_dataset = Rows(rows)
            trainer.train()
            steps.append(trainer.state.max_steps)
        assert steps == [4, 8]


@pytest.mark.extended
def test_two_processes_are_one(tmp_path):
    """DDP by accelerate: the same losses at the same global batch. Run as users do."""
    alone, both = tmp_path / "alone.json", tmp_path / "both.json"
    script = str(Path(__file__).with_name("hf_run.py"))
    single = subprocess.Popen([sys.executable, script, str(alone), "4"])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        str(both),
        "2",
    ]
    subprocess.run(launch, check=True, timeout=240)
    assert single.wait(timeout=240) == 0
    one, two = (json.loads(path.read_text()) for path in (alone, both))
    assert [entry["bag_size"] for entry in one] == [entry["bag_size"] for entry in two] == [3] * 3 + [1] * 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


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
