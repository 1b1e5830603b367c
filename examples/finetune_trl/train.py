"""Supervised fine-tuning with TRL on label sets that ``vlmbatch export --to trl`` wrote.

``python train.py LABELS... --model MODEL --to TRAINED``. Needs ``pip install trl``; nothing here
knows vlmbatch, and any model that TRL can load with its processor will do.
"""

import argparse
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer


def labels(folder: Path) -> Dataset:
    """The conversations of one export: the last answer is what is to be learnt, given the rest."""
    rows = load_dataset("parquet", data_dir=str(folder), split="train")
    return rows.map(
        lambda messages: {"prompt": messages[:-1], "completion": messages[-1:]},
        input_columns="messages",
        remove_columns="messages",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, nargs="+", help="folders written by vlmbatch export")
    parser.add_argument(
        "--model", required=True, help="folder or Hub id of the model to start from"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many; for tests")
    args = parser.parse_args()

    trainer = SFTTrainer(
        model=args.model,
        processing_class=AutoProcessor.from_pretrained(args.model),
        train_dataset=concatenate_datasets([labels(folder) for folder in args.labels]),
        args=SFTConfig(
            output_dir=str(args.to),
            model_init_kwargs={"dtype": "float32"},  # demo's weights are stored in half precision
            max_length=None,  # an image's tokens must not be cut
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            gradient_checkpointing=False,  # a small model: memory is not what it lacks
            bf16=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=1,
        ),
    )
    for name, weights in trainer.model.named_parameters():
        weights.requires_grad = "vision" not in name  # the words are new, the pictures are not
    trainer.train()
    trainer.save_model()  # weights, config, and the processor with its chat template


if __name__ == "__main__":
    main()
