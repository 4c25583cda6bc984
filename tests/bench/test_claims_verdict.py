"""Rules that decide the claims, on invented results."""

import itertools
import math

import pytest

pytest.importorskip("transformers")

from bench.claims import gecko_loss, gecko_tasks, long_loss, loss, memory, models, runs, speed, task_runs, verdict  # noqa: E402


def test_significance_depends_on_the_spread_over_seeds():
    assert verdict.decide_lower([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]) == verdict.HELD
    assert verdict.decide_lower([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]) == verdict.NOT_HELD
    assert verdict.decide_lower([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) == verdict.UNDECIDED
    assert verdict.decide_lower([1.0, 1.0], [2.0, 2.0]) == verdict.UNDECIDED  # too few seeds
    assert verdict.decide_lower([1.0, 1.0, 1.0], [math.inf] * 3) == verdict.UNDECIDED
    assert verdict.decide_higher([0.9] * 3, [0.89] * 3, 0.02) == verdict.UNDECIDED
    assert verdict.decide_higher([0.9] * 3, [0.8] * 3, 0.02) == verdict.HELD
    near = ([1.0, 1.1, 0.9], [1.33, 1.43, 1.23])  # 4 standard errors
    assert verdict.decide_lower(*near) == verdict.HELD
    assert verdict.decide_lower(*near, errors=verdict.MANY_COMPARISONS) == verdict.UNDECIDED


def test_curves_fall_or_do_not():
    falling = [[3.0 + s, 2.0 + s, 1.0 + s] for s in (0, 0.5, 1)]
    assert verdict.decide_falling(falling) == verdict.HELD and verdict.decide_falling(falling[:2]) == verdict.UNDECIDED
    assert verdict.decide_falling([[3, 2, 2.1], [3, 2, 2.11], [3, 2, 2.12]]) == verdict.NOT_HELD
    assert verdict.decide_falling([[3, 2, 2.1], [3, 2, 1.9], [3, 2, 2.1]]) == verdict.UNDECIDED
    assert verdict.decide_falling([[3, 2, 2.0001]] * 3, 5e-4) == verdict.UNDECIDED
    assert verdict.combine([verdict.HELD, verdict.UNDECIDED]) == verdict.UNDECIDED
    assert verdict.combine([verdict.HELD, verdict.NOT_HELD]) == verdict.NOT_HELD
    assert verdict.combine([]) == verdict.UNDECIDED


def content(settings, result):
    facts = dict(run="seed", seconds=1.0, date="2026-01-01", machine=runs.facts())
    return {"settings": settings, "result": result, **facts}


def test_speed_compares_with_the_faster_llama():
    def run(length, ours, first, second):
        """Seconds of MEGALODON and of two Llamas; None: not measured."""
        seconds = dict(zip((speed.harness.OURS, *speed.LLAMAS), (ours, first, second), strict=True))
        times = {name: {"seconds": [t] if t else []} for name, t in seconds.items()}
        return content({"length": length}, {"times": times})

    found = [run(4096, 1.0, 1.02, 3.0), run(32768, 1.0, None, 1.5)]
    assert speed.rates(found)[4096] == (4096.0, pytest.approx(4096 / 1.02), speed.LLAMAS[0])
    assert speed.verdicts(found)["claim"] == verdict.HELD
    assert speed.verdicts([found[0], run(32768, 1.0, 1.33, 1.2)])["claim"] == verdict.NOT_HELD
    assert speed.verdicts([found[0], run(32768, 1.0, 1.33, None)])["claim"] == verdict.UNDECIDED
    assert speed.verdicts(found[1:])["claim"] == verdict.UNDECIDED


def test_memory_is_decided_by_bytes_a_token_and_by_growth():
    def run(kind, length, result):
        return content({"work_of": kind, "model": models.MEGALODON, "length": length}, result)

    def stream(end):
        return run("streaming", 9, {"resident": [[1000, 100], [9000, end]]})

    even = [run("training", n, {"peak_bytes": 10 * n}) for n in (16, 2)]
    uneven = [run("training", 16, {"peak_bytes": 180}), even[1]]
    assert memory.verdicts([*even, stream(101)])["claim"] == verdict.HELD
    assert memory.verdicts([*even, stream(103)])["claim"] == verdict.NOT_HELD
    assert memory.verdicts([*uneven, stream(101)])["claim"] == verdict.NOT_HELD
    assert memory.verdicts([stream(101)])["claim"] == verdict.UNDECIDED


def test_a_loss_is_decided_by_the_sweeps_choices_when_all_sizes_have_run():
    good_rate, bad_rate = 2e-3, 1e-3

    def run(size, model, seed, lr=good_rate, held_out=True, chunk=loss.LENGTH, train_loss=1.0):
        best = {models.MEGALODON: 2.0, models.LLAMA: 3.0}[model]
        bits = (best if lr == good_rate else 4.0) + 0.01 * seed
        settings = {"size": size, "model": model, "chunk": chunk, "lr": lr, "held_out": held_out}
        by_context = {str(loss.LENGTH): bits, "all": bits}
        return content(settings, dict(parameters=1, train_loss=train_loss, held_out_bits_per_byte=by_context))

    def sweep(size, **settings):
        """Runs that choose the rate by the training loss."""
        return [
            run(size, model, seed=0, lr=lr, held_out=False, train_loss=nats, **settings)
            for model in loss.MODELS
            for lr, nats in ((bad_rate, 1.1), (good_rate, 1.0))
        ]

    def sweep_and_seeds(size):
        return sweep(size) + [run(size, model, seed) for model in loss.MODELS for seed in range(3)]

    one_size, other_size = map(sweep_and_seeds, loss.TOKENS)
    assert loss.verdicts(one_size + other_size)["claim"] == verdict.HELD
    verdicts = loss.verdicts(one_size)
    assert verdict.HELD in verdicts.values() and verdicts["claim"] == verdict.UNDECIDED
    without_ours = [c for c in other_size if c["settings"]["model"] == models.LLAMA]
    assert loss.verdicts(one_size + without_ours)["claim"] == verdict.UNDECIDED
    others = [run("1M", models.MEGALODON, seed, lr=bad_rate) for seed in range(3)]
    verdicts = loss.verdicts(one_size + other_size + others)
    assert verdicts["claim"] == verdict.HELD and [*verdicts.values()].count(verdict.NOT_HELD) == 2
    assert verdicts[f"1M in chunks of {loss.LENGTH} at the rate 0.001, {next(iter(loss.FIGURES))}"] == verdict.NOT_HELD
    half = loss.LENGTH // 2
    others = [run("1M", models.MEGALODON, seed, chunk=half) for seed in range(3)] + sweep("1M", chunk=half)
    assert loss.verdicts(one_size + other_size + others)["claim"] == verdict.HELD
    assert [row.split(" | ")[4] for row in loss.table(one_size)[2:]] == ["0.002, the sweep's"] * 2


def test_tasks_are_decided_when_all_have_run():
    def run(task, entrant, seed, right=None):
        """`right`: share of right answers; by default 0.9 for our model and 0.4 for the others."""
        if right is None:
            right = 0.9 if entrant == task_runs.OURS else 0.4
        accuracy = [{"length": 128, "targets": right + 0.01 * seed, "rows": 0.0}]
        return content({"task": task, **entrant._asdict(), "lr": 1e-3, "seed": seed}, {"accuracy": accuracy})

    found = [run(task, e, seed) for task in task_runs.TASKS for e in task_runs.DECIDING for seed in range(3)]
    assert task_runs.verdicts(found)["claim"] == verdict.HELD
    assert task_runs.verdicts(found[6:])["claim"] == verdict.UNDECIDED
    assert task_runs.verdicts(found[:-1])["claim"] == verdict.UNDECIDED
    others = [run("mqar", task_runs.SHORT_CHUNKS, seed, right=0.1) for seed in range(3)]
    assert task_runs.verdicts(found + others)["claim"] == verdict.HELD
    assert " 0.1100 ± " in next(line for line in task_runs.table(found + others) if line.startswith("| mqar"))
    worse = [run("mqar", task_runs.OURS, seed, right=0.2) for seed in range(3)]
    assert task_runs.verdicts(worse + found[3:])["claim"] == verdict.NOT_HELD


def test_long_runs_choose_by_validation_and_are_decided_by_test(tmp_path, monkeypatch, capsys):
    ours, theirs = loss.MODELS
    # Bits of the validation text at the best rate, and that rate: Muon is better for ours, AdamW for the Llama.
    best = {(ours, "adamw"): (1.5, 8e-3), (ours, "muon"): (1.4, 32e-3)}
    best |= {(theirs, "adamw"): (1.4, 5e-4), (theirs, "muon"): (1.5, 2e-3)}

    def work(scratch, *, size, length, model, optimizer, lr, seed, **_):
        """On the test text ours is better in rows of 512 alone, and AdamW is better for both."""
        bits, rate = best[model, optimizer]
        validation = bits + 0.01 * abs(math.log2(rate / lr))
        test = 1.3 if model == ours else 1.5 if length == 512 else 1.4
        test += 0.001 * seed
        if optimizer == "adamw":
            test -= 0.1
        looks = {part: {"validation": validation, "test": test + 1 - float(part)} for part in ("0.25", "0.5", "1")}
        return {"looks": looks, "whole": test, "train_loss": 1.0, "parameters": 1}

    monkeypatch.setattr(long_loss, "work", work)
    session = runs.Session("long-loss", tmp_path)
    long_loss.run(session, None)
    found = [*runs.results(session.path).values()]
    names = {content["run"] for content in found}
    rates = {name.split()[4] for name in names if name.startswith("100k 512 megalodon muon lr=")}
    assert rates == {"lr=0.008", "lr=0.016", "lr=0.032", "lr=0.064"}  # the most that a sweep adds
    # The Llama's AdamW, chosen with its best rate at an end, has a third additional rate.
    assert len(names) == len(found) == len(session.planned_runs) == (3 + 4) + (5 + 3) + 4 + 2 + 2 * (2 + 2) + 2
    assert {f"1M 512 megalodon muon lr={rate} seed=0" for rate in (0.016, 0.032)} <= names
    assert {f"1M 512 llama adamw lr={rate} seed=0" for rate in (0.00025, 0.0005)} <= names
    assert "100k 512 megalodon muon English lr=0.032 seed=0" in names
    chosen = {
        ("100k", length, model): (optimizer, lr)
        for length in (512, 2048)
        for model, optimizer, lr in ((ours, "muon", 32e-3), (theirs, "adamw", 5e-4))
    }
    larger = {("1M", 512, ours): ("muon", 32e-3), ("1M", 512, theirs): ("adamw", 5e-4)}
    assert {shape: key[3:5] for shape, key in long_loss.chosen_keys(found).items()} == chosen | larger
    verdicts = long_loss.verdicts(found)
    assert verdicts["100k, rows of 512, test"] == verdicts["claim"] == verdicts["1M, rows of 512, test"] == verdict.HELD
    assert verdicts["100k, rows of 2048, test"] == verdict.UNDECIDED
    long_rows = [content for content in found if content["settings"]["length"] == 2048]
    assert long_loss.verdicts(long_rows)["claim"] == verdict.UNDECIDED
    row = next(line for line in long_loss.table(found) if "| 512 " in line and "muon, 0.032, chosen" in line)
    figures = "1.3010 ± 0.0010 | 1.8010 ± 0.0010 | 2.0510"
    assert row.startswith(f"| Python | 512 | megalodon | 1 | muon, 0.032, chosen | 3 | {figures}")


def test_a_part_of_gecko_pays_where_the_control_of_equal_operations_is_worse():
    part = task_runs.Entrant("two chunks", 32)
    assert gecko_tasks.costs(part._replace(model=models.MEGALODON), 128) == (2 * (32 + 128) * 16, 32 * (32 + 128))
    assert gecko_tasks.costs(part, 128) == (2 * (32 + 128) * (16 + 24), 2 * 32 * (32 + 128))
    assert gecko_tasks.control(part, 128).chunk == 128  # of 64, a token sees 32 keys
    assert gecko_loss.control(gecko_loss.PARTS[0]).chunk == 256
    costs = gecko_tasks.costs(part._replace(model="memory"), 128)
    assert costs == (2 * (32 + 128) * 16 + 6 * 32 * 128, 32 * (32 + 128) + 32 * 128 + 32 + 32 * 32)

    def run(task, entrant, seed, right):
        accuracy = [{"length": 256, "targets": right + 0.001 * seed, "rows": 0.0}]
        return content({"task": task, **entrant._asdict(), "lr": 1e-3, "seed": seed}, {"accuracy": accuracy})

    def all_with(shares, parts_seeds=3):
        entrants = itertools.product(gecko_tasks.RATES, gecko_tasks.ENTRANTS, range(3))
        return [
            run(task, entrant, seed, shares.get(entrant, 0.2))
            for task, entrant, seed in entrants
            if entrant.model == models.MEGALODON or seed < parts_seeds
        ]

    assert gecko_tasks.verdicts(all_with({}))["claim"] == verdict.NOT_HELD
    assert gecko_tasks.verdicts(all_with({})[3:])["claim"] == verdict.UNDECIDED
    assert gecko_tasks.verdicts(all_with({part: 0.29}, 1))["claim"] == verdict.NOT_HELD
    assert gecko_tasks.verdicts(all_with({part: 0.31}, 1))["claim"] == verdict.UNDECIDED  # more seeds are needed
    verdicts = gecko_tasks.verdicts(all_with({part: 0.4}))
    assert verdicts["claim"] == verdict.HELD
    better = "two chunks: better than MEGALODON in chunks of"
    held = "held at length 256"
    assert verdicts[f"needle, {better} 32"] == verdicts[f"needle, {better} 128, the control"] == held
    control = task_runs.Entrant(models.MEGALODON, 128)
    verdicts = gecko_tasks.verdicts(all_with({part: 0.4, control: 0.35}))
    assert verdicts["claim"] == verdict.NOT_HELD  # a gain, but at too high a cost
    assert verdicts[f"mqar, {better} 32"] == verdicts[f"mqar, {better} 64"] == held
    assert gecko_tasks.control(part._replace(model="decay norm"), 128).chunk == 32
    assert "| two chunks | 32 | 12,800 | 10,240 | 0.4010 ± 0.0010 |" in gecko_tasks.table(all_with({part: 0.4}))

    memory, both = gecko_tasks.LONG_CHUNK_MEMORY, gecko_tasks.TWO_CHUNKS_WITH_MEMORY[0]
    comparison = "mqar, two chunks with memory, logits of 3: better than memory, logits of 3 in chunks of 64"
    assert gecko_tasks.verdicts(all_with({both: 0.8, memory: 0.6}))[comparison] == held
    assert comparison not in gecko_tasks.verdicts(all_with({both: 0.8, memory: 0.75}))

    def bits(shown, seeds=3, lr=4e-3):
        def run(entrant, seed):
            by_context = dict.fromkeys(map(str, gecko_loss.CONTEXTS), shown.get(entrant, 2.0) + 1e-4 * seed)
            settings = {**entrant._asdict(), "lr": lr, "seed": seed}
            return content(settings, {"bits_per_byte": by_context, "train_loss": lr})

        return [run(*each) for each in itertools.product(gecko_loss.ENTRANTS, range(seeds))]

    part = gecko_loss.PARTS[0]
    assert gecko_loss.verdicts(bits({part: 1.995}, 1))["claim"] == verdict.NOT_HELD
    assert gecko_loss.verdicts(bits({part: 1.98}, 1))["claim"] == verdict.UNDECIDED  # more seeds are needed
    assert gecko_loss.repeated_entrants(gecko_loss.figures(bits({part: 1.98}, 1))) == [gecko_loss.control(part), part]
    rates = [*bits({part: 1.5}, 1, 8e-3), *bits({part: 1.98}, 1)]
    assert gecko_loss.figures(rates)[part][64] == [1.98]  # at the rate of the lower training loss
    assert gecko_loss.verdicts(bits({part: 1.98}))["claim"] == verdict.HELD
    assert gecko_loss.verdicts(bits({part: 1.995}))["claim"] == verdict.NOT_HELD
    assert gecko_loss.verdicts(bits({part: 1.98, gecko_loss.control(part): 1.985}))["claim"] == verdict.NOT_HELD
    assert gecko_loss.verdicts(bits({part: 1.98})[:-1])["claim"] == verdict.HELD
    assert gecko_loss.verdicts(bits({}, 1)[:-1])["claim"] == verdict.UNDECIDED
