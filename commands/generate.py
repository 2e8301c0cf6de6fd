"""`anyvlm generate`: ask a composed model."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli_options import DebugOption, TrustOption
from .running import calm_transformers, load_composed, naming, progress


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A composed model: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", exists=True, dir_okay=False, help="A picture; repeat for several, in order."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", "-v", exists=True, dir_okay=False, help="A video file; repeat for several, in order."),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video to look at. Default: the checkpoint's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a composed model about pictures and videos, and print its answer.

    The answer is the most probable one (no sampling). Pictures come first in the message, in their order, then videos,
    then the prompt. Reading videos needs PyAV: pip install 'anyvlm[video]'.

    Example: anyvlm generate out/demo/checkpoint --image digit.png --prompt "Which digit is this?"

    Example: anyvlm generate my-vlm --video clip.mp4 --num-frames 16 --prompt "What happens?"
    """
    calm_transformers()
    with progress.status(f"Loading {checkpoint}…"), naming(checkpoint):
        model, processor = load_composed(checkpoint, trust_remote_code)

    pictures, videos = ([str(path) for path in paths or []] for paths in (image, video))
    content = [{"type": "image"}] * len(pictures) + [{"type": "video"}] * len(videos)
    content.append({"type": "text", "text": prompt})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[pictures] if pictures else None,
        videos=[videos] if videos else None,
        **({} if num_frames is None else {"num_frames": num_frames}),
        # Most chat templates write the bos themselves; a second one would be another prompt.
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
    ).to(model.device)
    with progress.status("Generating…"):
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    typer.echo(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
