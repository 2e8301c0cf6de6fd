"""What fusions other than `embed` carry beside the text: the tokens of each sample's pictures, and who sees them."""

import torch
from torch.nn.utils.rnn import pad_sequence


#: Which pictures a token of the text sees: the one that was shown last, as in Flamingo, or all that were shown so far.
SEE = ("latest", "all")


class PictureStates:
    """Tokens of the pictures of each sample, and how many pictures each position of the text has been shown.

    Args:
        tokens: `(batch, num_tokens, width)`, the tokens of a sample's pictures one after another, padded with zeros.
        picture_of_token: `(batch, num_tokens)`, int64: the number of the picture, from 1; 0 at padding.
        pictures_shown: `(batch, sequence)`, int64: how many pictures stand up to this position of the text.
        keys_values: Number of a layer -> its keys and values of `tokens`. Filled without gradients, so that decoding
            computes them once.
        samples: Where several samples are packed in a row: the sample of each position `(batch, sequence)`, and of each of
            `tokens` `(batch, num_tokens)`, both int64.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        picture_of_token: torch.Tensor,
        pictures_shown: torch.Tensor,
        keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
        samples: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.tokens = tokens
        self.picture_of_token = picture_of_token
        self.pictures_shown = pictures_shown
        self.keys_values = {} if keys_values is None else keys_values
        self.samples = samples

    @classmethod
    def from_pictures(
        cls,
        pictures: list[torch.Tensor],
        image_mask: torch.Tensor,
        ends: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
    ) -> "PictureStates":
        """Give each sample its pictures, by the placeholders in its text.

        Args:
            pictures: The tokens `(num_tokens, width)` of each picture of the batch, in order; at least one picture.
            image_mask: Boolean `(batch, sequence)`, true at each picture's placeholder.
            ends: Boolean `(batch, sequence)`, true at tokens after which no picture is seen until the next one.
            samples: The sample of each position, where several are packed in a row.

        Raises:
            ValueError: more or fewer pictures than placeholders.
        """
        counts = image_mask.sum(1).tolist()
        if sum(counts) != len(pictures):
            raise ValueError(
                f"{len(pictures)} pictures came with a text that has {sum(counts)} image tokens. With this fusion each "
                "picture has one image token in the text; make both in one call of the processor."
            )
        tokens, numbers, sample_of_token = [], [], []
        rest = list(pictures)
        for row, count in enumerate(counts):
            own, rest = rest[:count], rest[count:]
            tokens.append(torch.cat(own) if own else pictures[0][:0])
            lengths = torch.tensor([len(picture) for picture in own], dtype=torch.long, device=image_mask.device)
            numbers.append(torch.arange(1, count + 1, device=image_mask.device).repeat_interleave(lengths))
            if samples is not None:
                sample_of_token.append(samples[row, image_mask[row]].repeat_interleave(lengths))
        shown = image_mask.long().cumsum(1)
        if ends is not None:
            position = torch.arange(1, image_mask.shape[1] + 1, device=image_mask.device).expand_as(shown)
            last_picture = (position * image_mask).cummax(1).values
            last_end = (position * ends).cummax(1).values.roll(1, dims=1)  # of those before the token
            last_end[:, 0] = 0
            shown = shown.masked_fill(last_end >= last_picture, 0)
        packed = None if samples is None else (samples, pad_sequence(sample_of_token, batch_first=True))
        return cls(
            pad_sequence(tokens, batch_first=True), pad_sequence(numbers, batch_first=True), shown, samples=packed
        )

    @classmethod
    def without_pictures(cls, text: torch.Tensor, width: int) -> "PictureStates":
        """For text `(batch, sequence, …)` in which no picture stands."""
        batch_size, length = text.shape[:2]
        shape = {"dtype": torch.long, "device": text.device}
        return cls(
            torch.zeros(batch_size, 0, width, device=text.device),
            torch.zeros(batch_size, 0, **shape),
            torch.zeros(batch_size, length, **shape),
        )

    def visible(self, see: str) -> torch.Tensor:
        """Boolean `(batch, sequence, num_tokens)`: which tokens of pictures each position sees."""
        shown = self.pictures_shown.unsqueeze(2)
        number = self.picture_of_token.to(shown.device).unsqueeze(1)
        visible = (number == shown if see == "latest" else number <= shown) & (number > 0)
        if self.samples is None:
            return visible
        of_position, of_token = self.samples
        return visible & (of_position.unsqueeze(2) == of_token.unsqueeze(1))

    def window(self, start: int, length: int) -> "PictureStates":
        """The same pictures for `length` positions from `start` on. Positions after the text that is known have been
        shown what its last one was: no picture is generated."""
        last = self.pictures_shown.shape[1] - 1
        positions = torch.arange(start, start + length, device=self.pictures_shown.device).clamp(max=last)
        return PictureStates(
            self.tokens, self.picture_of_token, self.pictures_shown[:, positions], keys_values=self.keys_values
        )

    def expand(self, times: int) -> "PictureStates":
        """Each sample `times` times, one after another, as generation does for beams."""
        tensors = (self.tokens, self.picture_of_token, self.pictures_shown)
        return PictureStates(*(tensor.repeat_interleave(times, dim=0) for tensor in tensors))
