"""python -m scripts.evaluation --model runs/demo/causal --files tests/data/wizard_of_oz.txt --measure perplexity

Measure a model on held-out text and write the results as JSON, from which python -m scripts.cards makes a model card:

perplexity  causal: of whole documents (or --context tokens of them), per token, per word, by position, bits per byte
masked      masked: loss and accuracy on randomly masked tokens, as in training
pseudo      masked: pseudo-perplexity of passages, one token masked at a time
speed       tokens per second, forward and, for a causal model, in generation
recall      causal: associative recall and a needle in random tokens (recall.py), for sequences of --lengths tokens
lm_eval     causal: the tasks of lm_eval_tasks/ by lm-eval-harness (pip install "flash-hf[eval]"), without network

--output is a file with a list of results. Several runs may share it; new results replace old ones of the same name.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from flash_hf.commands.options import OptionParser, find_device, natural, number, run_command
from flash_hf.sources import load_named, read_json

from ..provenance import program_words


MEASURES = ("perplexity", "masked", "pseudo", "speed", "recall", "lm_eval")
LM_EVAL_TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
TASKS = {AutoModelForCausalLM: "text-generation", AutoModelForMaskedLM: "fill-mask"}


def machine_name(device: torch.device) -> str:
    """Device, threads, and the version of torch."""
    from ..provenance import processor

    if device.type == "cpu":
        where = f"{processor()} ({torch.get_num_threads()} threads)"
    else:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{where}; torch {torch.__version__}"


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--files", nargs="+", help="held-out texts, in the formats of the training commands")
    parser.add_argument(
        "--dataset", default=None, help="name of the data in the results; by default that of the first file"
    )
    parser.add_argument("--measure", nargs="+", choices=MEASURES, required=True)
    parser.add_argument("--max_documents", type=natural, default=None, help="use the first documents only")
    parser.add_argument(
        "--context", type=natural, default=None, help="perplexity: tokens of context; by default the whole document"
    )
    parser.add_argument("--segment", type=natural, default=4096, help="perplexity: tokens read at once")
    parser.add_argument("--block_size", type=number(int, least=2), default=512, help="masked: tokens per block")
    parser.add_argument(
        "--mlm_probability",
        type=number(float, above=0, most=1),
        default=0.15,
        help="masked: share of the tokens masked",
    )
    parser.add_argument("--passages", type=natural, default=100, help="pseudo: number of documents, from the first")
    parser.add_argument("--batch_size", type=natural, default=8, help="masked, pseudo, recall: sequences per batch")
    parser.add_argument(
        "--lengths", type=natural, nargs="+", default=[512, 8192], help="speed, recall: tokens per sequence"
    )
    parser.add_argument(
        "--limit", type=natural, default=None, help="lm_eval: use the first questions of each task only"
    )
    dtypes = ("float32", "bfloat16", "float16", "auto")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the weights; auto: as saved")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; by default the accelerator if there is one")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of results to create or extend")
    args = parser.parse_args()
    if {"perplexity", "masked", "pseudo"} & set(args.measure) and not args.files:
        parser.error("--files must name held-out text for perplexity, masked and pseudo")
    from flash_hf.training.documents import load_documents

    from ..provenance import commit
    from . import cost, harness, language

    if args.output is not None:  # refuse a bad file before the measurements, which may take hours
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if args.output.exists():
            read_json(args.output, list)
    device = find_device(args.device)
    config = load_named(AutoConfig.from_pretrained, args.model, option="--model")
    masked = "MaskedLM" in (config.architectures or [""])[0]
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    causal_only = {"perplexity", "recall", "lm_eval"} & set(args.measure)
    wrong = {"masked", "pseudo"} & set(args.measure) if not masked else causal_only
    if wrong:
        parser.error(f"{', '.join(sorted(wrong))} cannot be measured with {(config.architectures or ['no head'])[0]}")
    documents = load_documents(args.files, max_documents=args.max_documents) if args.files else None
    tokenizer = load_named(AutoTokenizer.from_pretrained, args.model, option="--model")
    model = load_named(auto.from_pretrained, args.model, option="--model", dtype=args.dtype).to(device).eval()

    command = shlex.join([*program_words(), *sys.argv[1:]])
    found = []

    def note(dataset: str, split: str, scores: dict[str, float]) -> None:
        for metric, value in scores.items():
            found.append({
                "task": TASKS[auto], "dataset": dataset, "split": split, "metric": metric,
                "value": value if isinstance(value, int) else float(f"{value:.5g}"), "command": command,
                "machine": machine_name(model.device), "commit": commit(),
            })  # fmt: skip
            print(f"{dataset:<24} {split:<14} {metric:<34} {found[-1]['value']}", flush=True)

    split = "validation" if args.max_documents is None else f"validation, first {args.max_documents} documents"
    name = args.dataset or (Path(args.files[0]).name.split(".")[0] if args.files else "none")
    for measure in args.measure:
        if measure == "perplexity":
            scores = language.score_documents(model, tokenizer, documents, context=args.context, segment=args.segment)
            suffix = "" if args.context is None else f", context {args.context}"
            note(name, split, {metric + suffix: value for metric, value in scores.metrics().items()})
            places = {f"loss, tokens {row['above'] + 1} to {row['up_to']}": row["loss"] for row in scores.by_position}
            note(name, split, {metric + suffix: value for metric, value in places.items()})
        elif measure == "masked":
            scores = language.masked_scores(
                model, tokenizer, documents, block_size=args.block_size, mlm_probability=args.mlm_probability,
                batch_size=args.batch_size,
            )  # fmt: skip
            note(name, split, scores)
        elif measure == "pseudo":
            texts = (row["text"] for row in documents.take(min(args.passages, len(documents))))
            scores = language.pseudo_perplexity(model, tokenizer, texts, batch_size=args.batch_size)
            note(name, f"validation, first {args.passages} documents", scores)
        elif measure == "speed":
            note("random-tokens", "none", {
                f"forward tokens/s, length {length}": cost.tokens_per_second(model, batch_size=1, length=length)
                for length in args.lengths
            })  # fmt: skip
            if not masked:
                speed = cost.tokens_per_second(model, batch_size=1, length=512, new_tokens=64)
                note("random-tokens", "none", {"decoded tokens/s, batch 1": speed})
        elif measure == "recall":
            from .recall import answer_accuracy, mqar, needle

            for length in args.lengths:
                draw, size = torch.Generator().manual_seed(0), model.config.vocab_size
                for task, rows in (
                    ("mqar, 8 pairs", mqar(32, length, 8, size, draw)), ("needle", needle(32, length, size, draw))
                ):  # fmt: skip
                    accuracy = answer_accuracy(model, *rows, batch_size=args.batch_size)
                    note("random-tokens", "none", {f"{task}, accuracy, length {length}": accuracy})
        else:
            for task, scores in harness.run_lm_eval(model, tokenizer, LM_EVAL_TASKS, limit=args.limit).items():
                note(task, "test", scores)

    if args.output is not None:
        kept = read_json(args.output, list) if args.output.exists() else []
        new = {(row["dataset"], row["split"], row["metric"]) for row in found}
        kept = [row for row in kept if (row["dataset"], row["split"], row["metric"]) not in new]
        args.output.write_text(json.dumps(kept + found, indent=1) + "\n", encoding="utf-8")
        print(args.output)


if __name__ == "__main__":
    run_command(main)
