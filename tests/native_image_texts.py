"""What native processors write around the tokens of a picture and of its tiles, as `image_text`."""

#: What Aya Vision's processor writes, and Idefics3's.
AYA_TEXT = {
    "token": "<|IMG_PATCH|>",
    "start": "<|START_OF_IMG|>",
    "end": "<|END_OF_IMG|>",
    "tile": "TILE_{index}{tokens}",
    "whole": "TILE_GLOBAL{tokens}",
}
IDEFICS3_TEXT = {
    "tile": "<fake_token_around_image><row_{row}_col_{column}>{tokens}",
    "row_end": "\n",
    "whole": "\n<fake_token_around_image><global-img>{tokens}<fake_token_around_image>",
    "whole_alone": "<fake_token_around_image><global-img>{tokens}<fake_token_around_image>",
}
