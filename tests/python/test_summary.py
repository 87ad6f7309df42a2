"""Tests of tools/report/summary.py and of what it is made of, on made records."""

from __future__ import annotations

import json
import math
import unittest
from typing import Any

import jsonschema
from sample_records import (
    FILL,
    budget,
    decoding,
    document,
    full_run,
    generating,
    lossless,
    plain,
    record,
    task,
    threshold,
    trace,
    trained_cells,
)
from support import ToolTest, results_schema  # lets the tools be imported

# isort: split
from tools.data.workloads import words_for
from tools.report import summary
from tools.report.outcomes import loss_percent
from tools.report.reasons import reason
from tools.report.records import rows_of
from tools.report.scenarios import Scenario, scenarios_of
from tools.report.summary_lines import MOST_LINES, summary_lines

FAQ = ("minilm-pooled", "sample-faq")
DOCUMENTS = ("smollm2", "sample-documents")


def scenarios(*records: dict[str, Any]) -> list[Scenario]:
    return scenarios_of(rows_of([document(list(records))]))


def lines(*records: dict[str, Any]) -> list[str]:
    return [str(line) for line in summary_lines(scenarios(*records))]


class RecordsTest(unittest.TestCase):
    def test_made_records_are_like_written_ones(self) -> None:
        jsonschema.Draft202012Validator(results_schema()).validate(json.loads(json.dumps(document(full_run()))))


class LinesTest(unittest.TestCase):
    def test_a_whole_run(self) -> None:
        found = lines(*full_run())
        self.assertLessEqual(len(found), MOST_LINES)
        self.assertEqual(
            found[0],
            "smollm2, chat: first token 2.9x sooner than with a KV cache per request, 3.6x from the second turn on, "
            "answers 9.2x sooner than without a cache; the same 704 tokens (86 % of the prompts known before)",
        )
        self.assertIn(
            "minilm-pooled, help-desk questions: 2.7x within an error budget of 0.02, measured 0.011 [0.007, 0.017]; "
            "accuracy -0.1 points [-0.7, +0.5] (30 % of the questions repeat word for word)",
            found,
        )
        self.assertIn(
            "bert-base, the paper's cells (like WikiText, SQuAD, OpenBookQA): 0.97x to 1.0x lossless (nothing repeats, "
            "so what is left is the cost of looking up and keeping), 1.2x with packed weights; the paper's mode 1.6x "
            "to 3.0x at tau 0.85, outputs 14 % to 25 % off; random weights: no quality",
            found,
        )
        self.assertTrue(all(line.isascii() for line in found))

    def test_every_loss_is_explained(self) -> None:
        for line in lines(*full_run()):
            if " 0.9" in line:
                self.assertRegex(line, r"0\.9\dx[^;]*\((no text begins|nothing repeats|hits save less)", line)

    def test_quality_of_trained_cells(self) -> None:
        (bert, _, gpt2) = lines(*trained_cells())
        self.assertIn("F1 -3.0 points [-3.7, -2.3], worst of 3; with under 0.5 % loss 0.96x to 1.8x (tau 0.93)", bert)
        self.assertIn("under 0.5 % loss at no tau that was tried", gpt2)

    def test_too_many_are_counted(self) -> None:
        made = [lossless("minilm", f"mine-{number}", 1 + number / 10) for number in range(20)]
        found = lines(*made)
        self.assertEqual(len(found), MOST_LINES)
        self.assertEqual(found[0], "minilm, mine-19: 2.9x lossless; the same answers up to rounding (1.3e-6)")
        self.assertEqual(found[-1], "and 9 more, 1.0x to 1.8x: see the report")

    def test_losses_of_a_model_are_one_line(self) -> None:
        made = [lossless("minilm", f"mine-{number}", 0.9, tokens=1200, note=None) for number in range(9)]
        made += [lossless("smollm2", f"mine-{number}", 1.5) for number in range(15)]
        found = lines(*made)
        self.assertEqual(len(found), MOST_LINES)
        loss = next(line for line in found if line.startswith("minilm: mine-0 0.90x lossless (texts of 10 tokens"))
        self.assertEqual(loss.count("0.90x"), 9)
        self.assertTrue(loss.endswith("; the same answers up to rounding (1.3e-6)"))

    def test_one_record(self) -> None:
        (line,) = lines(lossless(*FAQ, 1.5, **FILL))
        self.assertEqual(
            line, "minilm-pooled, help-desk questions: 1.5x lossless; the same answers up to rounding (1.3e-6)"
        )
        (line,) = lines(plain("minilm", "squad", ms=12.5))
        self.assertEqual(
            line, "minilm, questions about documents: 12.50 ms a request (no cache); nothing to compare it with"
        )
        self.assertEqual(lines(), [])

    def test_random_weights_alone(self) -> None:
        (line,) = lines(plain("bert-base", "banking77"), lossless("bert-base", "banking77", 1.4))
        self.assertEqual(line, "bert-base, bank customers' questions: 1.4x lossless; random weights: no quality")
        (line,) = lines(threshold("bert-base", "banking77", 0.9, 3.0, 0.5, 0.25))
        self.assertEqual(
            line,
            "bert-base, bank customers' questions: 3.0x in the paper's mode at tau 0.9; outputs 25 % off; random "
            "weights: no quality",
        )

    def test_missing_fields_and_odd_values(self) -> None:
        needed = ("model", "weights", "workload", "mode", "threads", "requests", "tokens", "latency_ms")
        for made in full_run():
            bare = {name: made[name] for name in needed}
            for values in ({}, {"speedup_vs_nocache": 2.0}, {"speedup_vs_nocache": math.inf}, {"fidelity": "budget"}):
                self.assertEqual(len(lines({**bare, **values})), 1)
            for odd in (None, math.nan, math.inf, -1.0, 0, True, "x"):
                found = {name: odd if isinstance(value, int | float | None) else value for name, value in made.items()}
                for line in lines({**found, "threads": 1}):
                    self.assertNotRegex(line, r"\b(nan|inf|None)\b")

    def test_a_budget_that_was_not_kept(self) -> None:
        (line,) = lines(lossless(*FAQ, 1.5), budget(*FAQ, 0.02, 3.0, 0.031))
        self.assertIn("1.5x lossless", line)
        self.assertTrue(line.endswith("; a budget of 0.02 was not kept (measured 0.031)"), line)
        (line,) = lines(budget(*FAQ, 0.02, 3.0, 0.031))
        self.assertIn("measured 0.031 [0.019, 0.046], over the budget", line)

    def test_which_budget_and_when(self) -> None:
        def chosen(*records: dict[str, Any]) -> Any:
            (scenario,) = scenarios(*records)
            assert scenario.chosen
            return scenario.chosen

        several = [budget(*FAQ, epsilon, 2 + 10 * epsilon, 0.001) for epsilon in (0.005, 0.02, 0.05)]
        self.assertEqual(chosen(*several).budget_epsilon, 0.02)
        self.assertEqual(chosen(lossless(*FAQ, 2.1), *several).kind, "lossless")  # errors are not worth 5 %
        as_loaded, packed = lossless(*FAQ, 2.0), lossless(*FAQ, 2.5, weights_held="packed-fp16")
        self.assertEqual(chosen(as_loaded, packed).weights_held, "packed-fp16")
        self.assertEqual(chosen(threshold(*FAQ, 0.85, 9, 0.9, 0.5), as_loaded).kind, "lossless")
        self.assertEqual(chosen(threshold(*FAQ, 0.95, 2, 0.2, 0.1), threshold(*FAQ, 0.86, 9, 0.9, 0.5)).threshold, 0.86)

    def test_generation_without_repeats(self) -> None:
        made = {**lossless("smollm2", "generate-512", 8.1), **generating(0.98, 8.1, 1.0, 0.0)}
        (line,) = lines(made)
        self.assertEqual(
            line,
            "smollm2, text generation (512 tokens): answers 8.1x sooner than without a cache, answers 0.98x as fast as "
            "with a KV cache per request (no text begins like an earlier one, so there is nothing to save); the same "
            "704 tokens",
        )

    def test_decoders_against_what_was_measured(self) -> None:
        both = lossless(*DOCUMENTS, 2.0, **decoding(1.7, 2.0, 0.7))
        self.assertIn("first token 1.7x sooner than with a KV cache per request", lines(both)[0])
        alone = {**both, "prefill_speedup_vs_kvcache": None, "speedup_vs_kvcache": None}
        self.assertIn("first token 2.0x sooner than without a cache", lines(alone)[0])
        at_once = {**both, "output": "new"}
        self.assertIn("1.7x as fast as with a KV cache per request", lines(at_once)[0])
        few = {**both, "requests": 3, "greedy": {"compared": 50, "different": 3, "tied": 1, "differences": []}}
        self.assertTrue(
            lines(few)[0].endswith("; 2 of 50 tokens differ (70 % of the prompts known before, only 3 requests)")
        )
        tied = {**both, "greedy": {"compared": 50, "different": 2, "tied": 2, "differences": []}}
        self.assertIn("; the same 50 tokens but for 2 ties (", lines(tied)[0])
        packed = {**both, "weights_held": "packed-fp16", "task": task("answer_nll", 1.9, 0.02, 0.01)}
        self.assertIn(
            "request, weights packed in half precision; the same 400 tokens; answer nll +0.020", lines(packed)[0]
        )

    def test_quality_by_two_metrics(self) -> None:
        choices = ("smollm2", "openbookqa", "choice_accuracy", "choice_accuracy_per_byte")
        answers = ("minilm-squad", "squad", "f1", "exact_match")
        for (model, workload, first, second), change, text in (
            (choices, 0.0, "choice accuracy the same, by sums and per byte"),
            (choices, -0.02, "choice accuracy the same; choice accuracy per byte -2.0 points [-3.0, -1.0]"),
            (answers, 0.0, "F1 and exact match the same"),
            (answers, -0.01, "F1 the same; exact match -1.0 points [-2.0, 0.0]"),
        ):
            both = {"task": task(first, 0.5, 0.0, 0.0), "second_task": task(second, 0.4, change, 0.01)}
            self.assertIn(text, lines(lossless(model, workload, 1.5, **both))[0])
            (scenario,) = scenarios(lossless(model, workload, 1.5, **both))
            self.assertAlmostEqual(loss_percent(scenario.rows[0]), -100 * change)

    def test_reasons(self) -> None:
        for made, text in (
            (lossless("minilm", "mine", 0.9, note=" it slept: 3 ms. "), "(it slept: 3 ms.)"),
            (threshold("minilm", "mine", 0.9, 0.9, 0.04, 0.1), "(only 4.0 % found a text that is similar enough"),
            (threshold("minilm", "mine", 0.9, 0.9, 0.6, 0.1), "(looking costs more than the hits save)"),
            (
                record("gpt2", "mine", "kvcache", speed=0.9, **{**decoding(1, 0.9, 0.0), "greedy": None}),
                "(what it keeps",
            ),
            (budget(*FAQ, 0.02, 0.9, 0, share_reused={"early_exit": 0.0}), "(calibration allowed hardly any reuse"),
            (lossless("minilm", "mine", 0.9, tokens_computed_fraction=0.6, tokens=600), "(texts of 5 tokens: the cost"),
            (
                lossless("minilm", "mine", 0.9, tokens_computed_fraction=0.6, speedup_median=1.1),
                "(half of the requests",
            ),
            (lossless("minilm", "mine", 0.9, tokens_computed_fraction=0.6), "(finding and keeping cost more"),
            (lossless("minilm", "mine", 0.9, requests=4), "; only 4 requests)"),
        ):
            noted = made if "slept" in text else {**made, "note": None}
            self.assertIn(text, lines(noted)[0])
        slower = [
            {**lossless("minilm", "mine", 0.9), "note": None},
            {**lossless("minilm", "mine", 0.8, weights_held="packed-fp16"), "note": None},
        ]
        (scenario,) = scenarios(*slower)
        self.assertIn("packed weights are slower here", reason(scenario.rows[1]))
        padded = [plain("minilm", "mine", tokens_computed_fraction=1.6), lossless("minilm", "mine", 0.95, note=None)]
        self.assertIn("finding and keeping cost more", lines(*padded)[0])  # leaving padding out saved something

    def test_runs_apart(self) -> None:
        names = {one.name for one in scenarios(lossless(*FAQ, 1.5), lossless(*FAQ, 2.0, sequences=960))}
        self.assertEqual(
            names,
            {"minilm-pooled, help-desk questions, one at a time", "minilm-pooled, help-desk questions, 8 at once"},
        )
        first, second = ([lossless(*FAQ, speed), plain(*FAQ), plain(*FAQ)] for speed in (1.5, 1.6))
        (again,) = scenarios_of(rows_of([document(first), document(second)]))
        self.assertEqual(
            [row.speedup_vs_nocache for row in again.rows], [1.6, 1.0, 1.0]
        )  # the second file's, all of them

    def test_words_for_traffic(self) -> None:
        for name, words, written in (
            ("sample-faq", "help-desk questions", True),
            ("openbookqa-5shot", "multiple-choice questions behind 5 solved ones", False),
            ("sample-choices-5shot", "multiple-choice questions behind 5 solved ones", True),
            ("small-edits-256", "lightly edited documents (256 tokens)", False),
            ("sample-chat-edit", "chats with a corrected turn", True),
            ("chat", "chat", False),
            ("sample", "short texts of all kinds", True),
            ("my-own", "my-own", False),
            ("my-own-5shot", "my-own-5shot", False),
        ):
            (scenario,) = scenarios(lossless("minilm", name, 1.5))
            self.assertEqual((words_for(name), scenario.written), (words, written), name)


class ProgramTest(ToolTest):
    def summary(self, *documents: object, report: bool = True) -> tuple[int, str, str]:
        files = [self.folder / f"{number}.json" for number in range(len(documents))]
        for file, made in zip(files, documents, strict=True):
            file.write_text(made if isinstance(made, str) else json.dumps(made), encoding="utf-8")
        return self.run_tool(summary, *files, *(["--report", self.folder / "report.html"] if report else []))

    def test_what_it_prints(self) -> None:
        status, out, err = self.summary(document(full_run()), trace())
        self.assertEqual((status, err), (0, ""))
        found, report, steps = out.strip().split("\n\n")
        self.assertLessEqual(len(found.splitlines()), MOST_LINES)
        self.assertEqual(report, f"report: {self.folder / 'report.html'}")
        self.assertEqual(
            [line.strip() for line in steps.splitlines()[:3]],
            [
                "to go on:",
                "tools/run.sh bench --model minilm-pooled --workload sample-faq --fidelity budget",
                "tools/run.sh data",
            ],
        )
        self.assertEqual(len(steps.splitlines()), 4)

    def test_traces(self) -> None:
        _, out, _ = self.summary(trace(), report=False)
        self.assertEqual(
            out,
            "eviction on mooncake_conversation: 5,000 blocks: s3fifo 13.3 %, +2.2 points against lru, optimum 33.0 %\n",
        )

    def test_nothing_and_mistakes(self) -> None:
        status, out, _ = self.summary(document([]), report=False)
        self.assertEqual((status, out), (0, "nothing was measured\n"))
        status, _, err = self.summary("{")
        self.assertEqual(status, 1)
        self.assertIn("summary: ", err)
        self.assertIn("not valid JSON", err)

    def test_lines_are_broken_for_terminals(self) -> None:
        text = summary.text_of(scenarios(*full_run()), [], None, width=80)
        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        self.assertIn("\n    ", text)


class NextStepsTest(ToolTest):
    def test_what_lacks_comes_first(self) -> None:
        real = [lossless("minilm-pooled", "banking77", 1.5), lossless("smollm2", "squad", 2.0)]
        steps = summary.next_steps(scenarios(*real), self.folder)
        self.assertEqual(steps[0], "tools/run.sh bench --model minilm-pooled --workload banking77 --fidelity budget")
        self.assertNotIn("tools/run.sh data", steps)
        self.assertIn("--target llmcache-generate && ", steps[1])
        program = self.folder / "bin" / "llmcache-generate"
        program.parent.mkdir()
        program.touch()
        self.assertTrue(summary.next_steps(scenarios(*real), self.folder)[1].startswith(str(program)))

    def test_always_three(self) -> None:
        for records in ([], [lossless("bert-base", "mine", 1.0)], full_run(), trained_cells()):
            steps = summary.next_steps(scenarios(*records), self.folder)
            self.assertEqual((len(steps), len(set(steps))), (3, 3))


if __name__ == "__main__":
    unittest.main()
