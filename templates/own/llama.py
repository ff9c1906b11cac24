"""A Llama of Hugging Face, trained by its Trainer as a plan says: `python llama.py plan.yaml`.

supar layout llama:make --base width=64 --wider width=128 --third width=192 --example llama:example -o layout.yaml
supar tune-proxy --layout layout.yaml --command 'python llama.py {plan}'
supar transfer proxy.yaml --width 512 --sparsity 0.9
python llama.py plan.yaml
"""

import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import supar_cli as supar

VOCAB, CONTEXT, LAYERS = 256, 64, 2  # the vocabulary is bytes
HEAD_WIDTH = 16  # at every width of the model


def make(width):  # called with the sizes of a layout or of a plan
    heads = width // HEAD_WIDTH
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=HEAD_WIDTH,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        )
    )


def example(model):  # the arguments of one forward pass, for `supar layout`
    return {"input_ids": torch.randint(VOCAB, (2, CONTEXT))}


@cache
def read_corpus():
    """The sources of Python's standard library as windows of bytes: all but the last tenth to train on, and the rest."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    examples = [{"input_ids": window, "labels": window} for window in windows]
    return examples[: -len(examples) // 10], examples[-len(examples) // 10 :]


def batches(seed, step):  # for `supar check`
    examples, generator = read_corpus()[0], torch.Generator().manual_seed(seed * 10**6 + step)
    chosen = torch.randint(len(examples), (8,), generator=generator)
    ids = torch.stack([examples[index]["input_ids"] for index in chosen])
    return {"input_ids": ids, "labels": ids}


class ReportLoss(TrainerCallback):
    """Tells `supar tune-proxy` each held-out loss, so that it can end a hopeless trial early."""

    def on_evaluate(self, args, state, control, metrics, **rest):
        supar.report_loss(metrics["eval_loss"], state.global_step)


def main(path):
    plan = supar.load(path)
    train = plan.train
    model = make(**plan.model.target)
    prepared = supar.prepare(model, plan)
    training, held_out = read_corpus()
    arguments = TrainingArguments(
        output_dir="trained",
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        warmup_steps=train.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=0,  # the optimizer clips: Trainer's clipping knows nothing of folded multipliers
        eval_strategy="steps",
        eval_steps=train.eval_every,
        save_strategy="no",
        report_to="none",
        seed=train.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out[: 8 * train.batch_size],
        optimizers=(prepared.optimizer(clip=train.grad_clip or None), None),
        callbacks=[supar.Callback(prepared), ReportLoss()],
    )
    trainer.train()
    trainer.evaluate()
    prepared.save("trained")
    model.save_pretrained("trained")


if __name__ == "__main__":
    main(sys.argv[1])
