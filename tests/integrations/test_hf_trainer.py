"""SuperpositionTrainer beside the Trainer of the installed transformers, on tiny models, on CPU."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer

from helpers.hf_cases import LENGTH, VOCABULARY, Rows, arguments, build, tokens
from tst_ext import SuperpositionSchedule
from tst_ext.integrations.hf import SuperpositionTrainer, restore


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


class Recorder(SuperpositionTrainer):
    """Keeps what each micro-batch was."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = [
            *getattr(self, "seen", []),
            {k: (v.clone() if torch.is_tensor(v) else v) for k, v in inputs.items()},
        ]
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
        rows, trains = [dict(Rows()[i], text="words", number=i) for i in range(40)], []
        for data in (Rows(40), rows, datasets.Dataset.from_list(rows)):
            trainer = SuperpositionTrainer(
                build("llama"), arguments(tmp_path), train_dataset=data, bag_size=3, ratio=0.5
            )
            trainer.train()
            trains.append(losses(trainer))
        assert len(trains[0]) == 10 and trains[0] == trains[1] == trains[2]
        with pytest.raises(
            ValueError, match=r"^train_dataset: expected a column.*\['text'\].*remove_unused_columns=False"
        ):
            SuperpositionTrainer(
                build("llama"), arguments(tmp_path), train_dataset=[dict(text="a")] * 9, bag_size=3, ratio=0.5
            ).train()
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, remove_unused_columns=False), train_dataset=rows, bag_size=3, ratio=0.5
        )
        with pytest.raises(ValueError, match=r"^batch: expected input_ids, labels.*'number'"):
            trainer.train()

    def test_a_collator_of_text(self, tmp_path):
        """Rows reach the user's collator as they are: it makes the same batches of text as of tokens."""
        rows, seen = Rows(), []

        def collate(texts):
            ids = torch.tensor([[int(word) for word in row["text"].split()] for row in texts])
            return dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))

        texts = [dict(text=" ".join(map(str, rows[i]["input_ids"]))) for i in range(len(rows))]
        for data, options in (
            (rows, {}),
            (texts, dict(data_collator=collate)),
            (datasets.Dataset.from_list(texts), dict(data_collator=collate)),
        ):
            changes = dict(remove_unused_columns=not options)
            trainer = Recorder(
                build("llama"), arguments(tmp_path, **changes), train_dataset=data, bag_size=3, ratio=0.5, **options
            )
            trainer.train()
            seen.append([batch["input_ids"] for batch in trainer.seen])
        assert len(seen[0]) == 10
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))

    def test_documents_of_unequal_length(self, tmp_path):
        """No bag of DataCollatorWithFlattening holds two documents; what a collator pads counts nowhere."""
        rows = [dict(input_ids=[3 + i] * (1 + i % 7)) for i in range(40)]
        for row in rows:
            row["labels"] = row["input_ids"]
        flat = Recorder(
            build("llama"), arguments(tmp_path), train_dataset=rows, bag_size=3, ratio=0.5,
            data_collator=DataCollatorWithFlattening(),
        )  # fmt: skip
        flat.train()
        for batch in flat.seen[:5]:
            bags, labels = batch["input_ids"][0], batch["labels"][0]
            read = [set(bag.tolist()) - {-100} for bag in bags]
            assert all(len(document) == 1 for document in read)
            assert all(set(y.tolist()) - {-100} <= document for y, document in zip(labels, read, strict=True))
            assert (batch["position_ids"] == 0).sum() == 2 * 3  # documents of two samples
        assert all(batch["input_ids"].shape[0] == 1 for batch in flat.seen[5:])
        assert all((batch["position_ids"] == 0).sum() == 2 for batch in flat.seen[5:])

        def pad(documents):
            width = max(len(row["input_ids"]) for row in documents)
            fill = lambda name, filler: torch.tensor([r[name] + [filler] * (width - len(r[name])) for r in documents])  # noqa: E731
            ids = fill("input_ids", 0)
            return dict(input_ids=ids, labels=fill("labels", -100), attention_mask=(ids > 0).long())

        padded = Recorder(
            build("llama"), arguments(tmp_path), train_dataset=rows, bag_size=3, ratio=0.5, data_collator=pad
        )
        padded.train()
        for batch in padded.seen[:5]:
            assert (batch["input_ids"] != 0).all() and batch["input_ids"].shape[0] == 2
            assert torch.equal(batch["attention_mask"], (batch["input_ids"] != -100).any(-1).long())

    def test_int32_rows(self, tmp_path):
        """Both phases and the evaluation train as with int64."""
        runs = []
        for dtype in (torch.int64, torch.int32):
            rows = [dict(input_ids=row, labels=row) for row in Rows().ids.to(dtype)]
            options = dict(eval_strategy="steps", eval_steps=5)
            trainer = SuperpositionTrainer(
                build("llama"), arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows[:4],
                bag_size=3, ratio=0.5,
            )  # fmt: skip
            trainer.train()
            runs.append([{k: v for k, v in e.items() if k in ("loss", "eval_loss")} for e in trainer.state.log_history])
        assert runs[0] == runs[1] and sum("eval_loss" in entry for entry in runs[0]) == 2

    def test_stages(self, tmp_path):
        trainer = Recorder(
            build("llama"), arguments(tmp_path), train_dataset=Rows(), bag_size=4, ratio=0.3, stages=((0.2, 2),)
        )
        trainer.train()
        assert [batch["input_ids"].shape[2:] for batch in trainer.seen] == [(4,)] * 3 + [(2,)] * 2 + [()] * 5
        some = SuperpositionTrainer(
            build("llama"),
            arguments(tmp_path, logging_steps=100),
            train_dataset=Rows(),
            bag_size=4,
            ratio=0.3,
            stages=((0.2, 2),),
        )
        some.train()
        by_step = dict(losses(trainer))
        assert [step for step, _ in losses(some)] == [3, 5]  # no average of two bag sizes
        assert losses(some)[1][1] == pytest.approx((by_step[4] + by_step[5]) / 2, abs=1e-4)
        logged = [(entry["step"], entry["bag_size"]) for entry in trainer.state.log_history if "bag_size" in entry]
        assert logged == list(enumerate([4] * 3 + [2] * 2 + [1] * 5, 1))
        epoch = SuperpositionTrainer(
            build("llama"),
            arguments(tmp_path, max_steps=-1, num_train_epochs=1),
            train_dataset=Rows(64),
            bag_size=4,
            ratio=0.3,
            stages=((0.2, 2),),
        )
        # A step reads 2 samples of 0.3 * 4 + 0.2 * 2 + 0.5 = 2.1 rows on average.
        assert epoch.schedule == SuperpositionSchedule(16, 0.3, 4, ((0.2, 2),))
        with pytest.raises(ValueError, match=r"^stages\[0\], bag_size: expected"):
            SuperpositionTrainer(
                build("llama"), arguments(tmp_path), train_dataset=Rows(), bag_size=4, ratio=0.3, stages=((0.2, 0),)
            )

    @pytest.mark.parametrize("phases", [dict(bag_size=3, ratio=0), dict(bag_size=1, ratio=0.5)], ids=["r=0", "s=1"])
    @pytest.mark.parametrize("options", [dict(max_steps=-1, num_train_epochs=3), dict(max_steps=10)])
    def test_without_bags_it_is_trainers_own_run(self, tmp_path, phases, options):
        """Steps, epochs, the order of the rows and all weights equal Trainer's."""
        rows, strategies = Rows(13), dict(save_strategy="epoch", eval_strategy="epoch", logging_strategy="epoch")
        own, ours = (
            make(
                build("llama"),
                arguments(tmp_path / name, **options, **strategies),
                train_dataset=rows,
                eval_dataset=rows,
            )
            for name, make in (("own", Trainer), ("ours", partial(SuperpositionTrainer, **phases)))
        )
        for trainer in (own, ours):
            trainer.train()
        assert ours.state.max_steps == own.state.max_steps == (21 if options["max_steps"] < 0 else 10)
        kept = [
            [{k: v for k, v in e.items() if k in ("loss", "eval_loss", "epoch", "step")} for e in t.state.log_history]
            for t in (own, ours)
        ]
        assert kept[0] == kept[1]
        assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
            p.name for p in (tmp_path / "own").iterdir()
        )
        for a, b in zip(own.model.parameters(), ours.model.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("count", ["all", "non_padding"])
    def test_tokens_are_counted(self, tmp_path, count):
        """4 steps of 8 samples of 4 rows of 12 tokens, and 4 steps of 8 rows: 1,920 tokens in all."""
        rows = [dict(Rows()[i], attention_mask=[1] * LENGTH) for i in range(64)]
        options = dict(max_steps=8, per_device_train_batch_size=8, include_num_input_tokens_seen=count)
        for data in (rows, Rows()):
            trainer = SuperpositionTrainer(
                build("llama"), arguments(tmp_path, **options), train_dataset=data, bag_size=4, ratio=0.5
            )
            trainer.train()
            assert trainer.state.num_input_tokens_seen == 4 * 8 * 4 * 12 + 4 * 8 * 12 == 1920
        # A model computes a position for each bag: as much as Trainer's own run of 8 steps.
        own = Trainer(build("llama"), arguments(tmp_path, **options), train_dataset=rows)
        own.train()
        assert own.state.num_input_tokens_seen == 8 * 8 * 12
        assert trainer.state.total_flos == own.state.total_flos > 0

    def test_tokens_of_bags_with_empty_slots_are_counted(self, tmp_path):
        """Rows of 10 tokens, of which 7 count; 3 rows are 21 tokens, in bags of 3 with empty slots behind them."""
        rows = [dict(input_ids=row[:10], labels=row[:10], attention_mask=torch.arange(10) < 7) for row in Rows().ids]
        options = dict(max_steps=2, include_num_input_tokens_seen="non_padding")
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, **options), train_dataset=rows, bag_size=3, ratio=0.5
        )
        trainer.train()
        assert trainer.state.num_input_tokens_seen == 2 * 3 * 7 + 2 * 7

    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_gradient_checkpointing(self, tmp_path, reentrant):
        """The same run with it as without, the embedding frozen."""
        runs = []
        for options in (
            {},
            dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant)),
        ):
            model = build("llama")
            model.get_input_embeddings().weight.requires_grad_(False)
            trainer = SuperpositionTrainer(
                model, arguments(tmp_path, **options), train_dataset=Rows(), bag_size=3, ratio=0.5
            )
            trainer.train()
            runs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
        torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-4, atol=0)

    def test_the_routers_loss(self, tmp_path):
        """It is in the loss of both phases, with the model's coefficient."""
        runs = []
        for coefficient in (0.0, 0.5):
            model = build("qwen3_moe", router_aux_loss_coef=coefficient)
            trainer = SuperpositionTrainer(
                model, arguments(tmp_path, learning_rate=0), train_dataset=Rows(), bag_size=3, ratio=0.5
            )
            trainer.train()
            runs.append(torch.tensor([loss for _, loss in losses(trainer)]))
        # Two chosen of four experts, nearly balanced: the router's loss is near 2.
        torch.testing.assert_close(runs[1] - runs[0], torch.ones(10), rtol=0.05, atol=0)

    def test_a_model_that_accelerate_has_prepared(self, tmp_path):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(build("llama"))
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match="^model: accelerate has wrapped the forward of LlamaForCausalLM"):
            SuperpositionTrainer(model, arguments(tmp_path), train_dataset=Rows(), bag_size=3, ratio=0.5)

    def test_a_second_trainer_of_one_model(self, tmp_path):
        """It still computes in bfloat16, with its own options of the loss."""
        model = build("llama")
        for loss_options, chance in ((dict(), VOCABULARY), (dict(objective="mce_alt"), VOCABULARY / 3)):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1e-3)
            trainer = SuperpositionTrainer(
                model,
                arguments(tmp_path, bf16=True, max_steps=1),
                train_dataset=Rows(),
                bag_size=3,
                ratio=1,
                loss_options=loss_options,
            )
            dtypes = []
            model.model.layers[0].mlp.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))  # noqa: B023
            trainer.train()
            assert losses(trainer)[0][1] == pytest.approx(math.log(chance), abs=0.03)
            assert dtypes[-1] == torch.bfloat16

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
        options |= dict(bf16=True)  # the last of the two above
        low = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, **options), train_dataset=Rows(), bag_size=3, ratio=0.5
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
            ({}, dict(loss_options=dict(position_weights=torch.ones(4))), r"^position_weights: expected .*\(3,\)"),
            ({}, dict(loss_options=dict(z_loss=-1.0)), "^z_loss: expected"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_work_is_refused_at_once(self, tmp_path, options, changes, message):
        given = dict(model=build("llama"), train_dataset=Rows(), bag_size=3, ratio=0.5) | changes
        with pytest.raises(ValueError, match=message):
            SuperpositionTrainer(args=arguments(tmp_path, **options), **given)
        assert given["model"] is None or "forward" not in vars(given["model"])

    def test_arguments_by_position(self, tmp_path):
        with pytest.raises(ValueError, match="^model_init: expected a model"):
            SuperpositionTrainer(
                None, arguments(tmp_path), None, Rows(), None, None, lambda: build("llama"), bag_size=3, ratio=0.5
            )

    def test_no_logs(self, tmp_path):
        runs = []
        for make in (Trainer, partial(SuperpositionTrainer, bag_size=3, ratio=0.5)):
            trainer = make(build("llama"), arguments(tmp_path, logging_strategy="no"), train_dataset=Rows())
            trainer.train()
            runs.append([entry["step"] for entry in trainer.state.log_history])
        assert runs[0] == runs[1] == [10]

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
        assert steps == [4, 8] and trainer.args.max_steps == -1  # which the user may give another trainer
        trainer.args.max_steps = 3
        trainer.train()
        assert trainer.state.max_steps == 3

    @pytest.mark.parametrize(
        ("rows", "bag_size", "ratio", "batch"), [(100, 8, 0.4, 8), (13, 2, 0.5, 1), (40, 5, 0.3, 3)]
    )
    def test_an_epoch_reads_every_row(self, tmp_path, rows, bag_size, ratio, batch):
        """With the least number of steps that does, as Trainer rounds up."""
        options = dict(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=batch)
        trainer = Recorder(
            build("llama"),
            arguments(tmp_path, **options),
            train_dataset=[dict(input_ids=[3 + i % 90] * 4, labels=[3 + i % 90] * 4) for i in range(rows)],
            bag_size=bag_size,
            ratio=ratio,
        )
        trainer.train()
        read = torch.cat([seen["input_ids"].flatten() for seen in trainer.seen])
        assert read.numel() >= 4 * rows and set(read.tolist()) == {3 + i % 90 for i in range(rows)}
        fewer = SuperpositionSchedule(trainer.state.max_steps - 1, ratio, bag_size)
        assert sum(batch * fewer.bag_size_at(i) for i in range(fewer.total_steps)) < rows

    def test_two_trainers_of_one_model(self, tmp_path):
        """Each has its own options of the loss, whichever was made last."""
        model, chances = build("llama"), []
        made = [
            SuperpositionTrainer(
                model,
                arguments(tmp_path, max_steps=1, learning_rate=0),
                train_dataset=Rows(),
                bag_size=3,
                ratio=1,
                loss_options=options,
            )
            for options in (dict(objective="mce_alt"), {})
        ]
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e-3)
        for trainer in made:
            trainer.train()
            chances.append(losses(trainer)[0][1])
        assert chances == pytest.approx([math.log(VOCABULARY / 3), math.log(VOCABULARY)], abs=0.03)

    def test_a_second_run_too_short_for_bags(self, tmp_path):
        """10 steps, the first with bags; then 6 rows, of which 0.1 are no step: Trainer's own run of 3 steps."""
        options = dict(max_steps=-1, num_train_epochs=1)
        trainer = SuperpositionTrainer(
            build("llama"), arguments(tmp_path, **options), train_dataset=Rows(24), bag_size=3, ratio=0.1
        )
        steps = []
        for rows in (24, 6):
            trainer.train_dataset = Rows(rows)
            trainer.train()
            steps.append((trainer.state.max_steps, [e["bag_size"] for e in trainer.state.log_history if "loss" in e]))
        assert steps == [(10, [3] + [1] * 9), (3, [1] * 3)]


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
