# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on a checkpoint's folder by name: the logged losses are those of each document alone."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from flash_hf import FlashConfig, FlashForCausalLM
from flash_hf.training import train_tokenizer
from helpers import make_model


trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TEXTS = [f"Dorothy lived in the midst of the great Kansas prairies{' with Uncle Henry' * i}." for i in range(6)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}\n"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal model with large weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([{"text": text} for text in TEXTS], 300)
    tokenizer.chat_template = TEMPLATE
    config = FlashConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, query_key_dim=16, chunk_size=16,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    make_model(FlashForCausalLM, config, dtype=torch.float32, scale=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def options(tmp_path, steps=1, **changes):
    return {
        "output_dir": str(tmp_path), "max_steps": steps, "per_device_train_batch_size": len(TEXTS),
        "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-3, **changes,
    }  # fmt: skip


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mean_loss(model, documents):
    """Over all labelled tokens of `[(ids, first labelled token, end)]`, each document alone."""
    total = count = 0
    with torch.no_grad():
        for ids, first, end in documents:
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            picked = log_p[first - 1 : end - 1].gather(1, torch.tensor(ids[first:end])[:, None])
            total, count = total - picked.sum().item(), count + len(picked)
    return total / count


@pytest.mark.parametrize("packing", [False, True])
def test_sft_by_name(packing, folder, tmp_path):
    """The first loss, and lower ones after it."""
    rows = Dataset.from_dict({"text": TEXTS})
    # TRL would cut rows that are too long: none is cut.
    batch = 1 if packing else len(TEXTS)
    arguments = trl.SFTConfig(
        **options(tmp_path, steps=4, per_device_train_batch_size=batch), packing=packing, max_length=1024
    )
    trainer = trl.SFTTrainer(folder, args=arguments, train_dataset=rows)
    assert type(trainer.model) is FlashForCausalLM and len(trainer.train_dataset) == batch
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    documents = [ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id] for ids in documents]
    expected = mean_loss(FlashForCausalLM.from_pretrained(folder), [(ids, 1, len(ids)) for ids in documents])
    losses = logged(trainer)
    assert abs(losses[0] - expected) < 2e-3 * expected and losses[-1] < losses[0]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_on_the_assistants_words_alone(packing, folder, tmp_path):
    turns = [("Who is Dorothy?", "A girl"), ("Where did she live with Uncle Henry?", "in Kansas, on the prairies")] * 3
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    arguments = trl.SFTConfig(
        **options(tmp_path, per_device_train_batch_size=1 if packing else len(chats)),
        packing=packing, max_length=1024, assistant_only_loss=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(folder, args=arguments, train_dataset=Dataset.from_dict({"messages": chats}))
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = []
    for chat in chats:
        whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, marked = list(whole["input_ids"]), list(whole["assistant_masks"])
        first, end = marked.index(1), len(marked) - marked[::-1].index(1)
        assert tokenizer.decode(ids[first:end]).lstrip() == chat[1]["content"] + tokenizer.eos_token
        documents.append((ids, first, end))
    expected = mean_loss(FlashForCausalLM.from_pretrained(folder), documents)
    assert abs(logged(trainer)[0] - expected) < 2e-3 * expected


@pytest.mark.parametrize("given", ["model", "name"])
def test_dpo_without_a_reference_model(given, folder, tmp_path):
    """The reference is loaded from where the model came from, and stays as it was."""
    pairs = {"prompt": ["Who lived in Kansas?", "Who is Henry?"], "chosen": [" Dorothy", " Uncle"]}
    pairs["rejected"] = [" The great prairies with Henry", " Kansas"]
    model = folder if given == "name" else FlashForCausalLM.from_pretrained(folder)
    trainer = trl.DPOTrainer(
        model, args=trl.DPOConfig(**options(tmp_path, steps=3), beta=0.1), train_dataset=Dataset.from_dict(pairs),
        eval_dataset=Dataset.from_dict(pairs), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    reference = FlashForCausalLM.from_pretrained(folder)
    trainer.train()
    losses = logged(trainer)
    assert abs(losses[0] - math.log(2)) < 1e-3 and losses[-1] < losses[0] - 0.01
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name

    def gain(prompt, completion):
        """Log-probability of the completion, less the reference's."""
        ids = [(prompt + completion, len(prompt), len(prompt + completion))]
        return len(completion) * (mean_loss(reference, ids) - mean_loss(trainer.model, ids))

    trainer.model.eval()
    margins = [
        gain(row["prompt_ids"], row["chosen_ids"]) - gain(row["prompt_ids"], row["rejected_ids"])
        for row in trainer.eval_dataset
    ]
    expected = sum(math.log1p(math.exp(-0.1 * margin)) for margin in margins) / len(margins)
    assert abs(trainer.evaluate()["eval_loss"] - expected) < 2e-3


def test_grpo_raises_its_reward(folder, tmp_path):
    def reward(completion_ids, **kwargs):
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    arguments = trl.GRPOConfig(
        **options(tmp_path, steps=25, per_device_train_batch_size=16, learning_rate=1e-2),
        num_generations=16,
        max_completion_length=8,
    )
    prompts = Dataset.from_dict({"prompt": ["Who lived in Kansas?", "Henry"] * 4})
    trainer = trl.GRPOTrainer(folder, reward_funcs=reward, args=arguments, train_dataset=prompts)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
