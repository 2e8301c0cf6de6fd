"""What a language model would have to see in a picture's place to give an answer: prompts tuned on the answers alone."""

from collections.abc import Sequence

import torch

from ..modeling.image_features import AnyVlmImageFeatures
from .student import Student
from .teacher_answers import TeacherAnswer


#: More different answers than that are not tuned for: there would be as much to do as for the pictures themselves.
MAX_ANSWERS = 32
STEPS = 40
LEARNING_RATE = 0.1
#: Against the size of embeddings. What a projector makes of a picture only comes near a prompt, so it should work nearby.
NOISE = 0.5


def tune_prompts(
    student: Student, lessons: Sequence[TeacherAnswer], seed: int = 0
) -> dict[tuple[str, str], torch.Tensor]:
    """Prompts `(tokens of a picture, width)` for each question and answer, by gradient steps on these few texts.

    Prompt tuning (Lester et al. 2021) for one answer at a time. No picture is looked at, so a step costs as much as one on
    so many pictures as there are answers.

    Returns:
        Empty where answers are too many, or pictures have different numbers of tokens.
    """
    pairs = {}
    for lesson in lessons:
        for answer in lesson.probabilities:
            pairs.setdefault((lesson.question, answer), lesson)
    if not 0 < len(pairs) <= MAX_ANSWERS:
        return {}
    examples = list(pairs.values())
    with torch.no_grad():
        encoded = student.encoded(examples)
    count = len(encoded.pooler_output[0])
    if any(len(tokens) != count for tokens in encoded.pooler_output):
        return {}
    embeddings = student.model.get_input_embeddings()
    with torch.no_grad():
        words = [student.answer_ids(lesson, answer) for (_, answer), lesson in pairs.items()]
        # From the words of the answer, over and over.
        start = [embeddings(ids.unsqueeze(0))[0].float().repeat(-(-count // len(ids)), 1)[:count] for ids in words]
        prompts = torch.stack(start)
        size = prompts.square().mean().sqrt()
    prompts = (prompts / size).requires_grad_(True)
    rows = student.rows(examples, [answer for _, answer in pairs])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([prompts], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for _ in range(STEPS):
        noise = torch.randn(prompts.shape, generator=generator).to(prompts.device)
        tokens = list((prompts + NOISE * noise) * size)
        encoded = AnyVlmImageFeatures(pooler_output=tokens, token_grids=encoded.token_grids)
        student.model(**rows, mm_encoder_outputs={"image": encoded}, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return dict(zip(pairs, (prompts * size).detach()))
