"""Train a composed model with an ordinary `Trainer`.

Compose two parts and train on your own conversations:

    python examples/train_with_trainer.py \
        --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct \
        --data train.jsonl --eval_data held_out.jsonl --freeze vision_tower \
        --output_dir runs/mine --num_train_epochs 1 --learning_rate 1e-4 --bf16

Each line of the files is `{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}],
"images": ["picture.png", …]}`; paths are relative to the file, and `<image>` in a content is where a picture stands.

Go on with a checkpoint, or train on scikit-learn's handwritten digits when there is no data at hand:

    python examples/train_with_trainer.py --model runs/mine --output_dir runs/digits --max_steps 100

Every option of `TrainingArguments` works: `--gradient_checkpointing`, `--gradient_accumulation_steps`,
`--resume_from_checkpoint`, …; so does `accelerate launch`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

import anyvlm


@dataclass
class ModelArguments:
    vision: str | None = field(default=None, metadata={"help": "Vision tower: Hub id or path."})
    text: str | None = field(default=None, metadata={"help": "Causal language model: Hub id or path."})
    model: str | None = field(
        default=None, metadata={"help": "A composed checkpoint, in place of --vision and --text."}
    )
    projector: str = field(default="mlp", metadata={"help": "Projector between them: linear or mlp."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels of an edge. Default: the tower's."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights; train in bf16 with --bf16."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that stay as they are: vision_tower, multi_modal_projector, language_model."},
    )


@dataclass
class DataArguments:
    data: str | None = field(default=None, metadata={"help": "JSON lines to train on. Default: handwritten digits."})
    eval_data: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sample in tokens; longer ones stop the run."}
    )


class Conversations(torch.utils.data.Dataset):
    """Samples of a JSON lines file; pictures are opened when they are needed."""

    def __init__(self, path: str):
        self.folder = Path(path).parent
        with open(path, encoding="utf-8") as file:
            self.samples = [json.loads(line) for line in file if line.strip()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        return {**sample, "images": [self.folder / name for name in sample.get("images", [])]}


def load_data(arguments: DataArguments) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    if arguments.data is None:
        from anyvlm.demo.data import TrainingQuestions, split_digits

        digits, held_out_digits = split_digits()
        return TrainingQuestions(digits, 20_000), TrainingQuestions(held_out_digits, 500, seed=1)
    return Conversations(arguments.data), Conversations(arguments.eval_data) if arguments.eval_data else None


def load_model(arguments: ModelArguments):
    if arguments.model:
        dtype = getattr(torch, arguments.dtype)
        return (
            AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, trust_remote_code=True),
            AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True),
        )
    if not (arguments.vision and arguments.text):
        raise SystemExit("Pass --vision and --text to compose a model, or --model for a checkpoint.")
    return anyvlm.compose(
        vision=arguments.vision,
        text=arguments.text,
        projector=arguments.projector,
        image_size=arguments.image_size,
        dtype=arguments.dtype,
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses()
    # The collator reads `messages` and `images`, which Trainer would drop as unknown to the model.
    training_arguments.remove_unused_columns = False
    set_seed(training_arguments.seed)

    model, processor = load_model(model_arguments)
    for name in model_arguments.freeze:
        getattr(model, name).requires_grad_(False)
    train_data, eval_data = load_data(data_arguments)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=anyvlm.AnyVlmDataCollator(processor, max_length=data_arguments.max_length),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    trainer.save_model()  # weights, config, code and processor: the folder loads anywhere
    if eval_data is not None:
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
