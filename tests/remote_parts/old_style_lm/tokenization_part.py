"""The made-up language model's tokenizer, with code of its own and a vocabulary file of its own format."""

import os

from transformers import PreTrainedTokenizer


VOCAB_FILES_NAMES = {"vocab_file": "words.made_up"}


class PartTokenizer(PreTrainedTokenizer):
    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as file:
            self.words = file.read().split("\n")
        self.ids = {word: index for index, word in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, (filename_prefix or "") + VOCAB_FILES_NAMES["vocab_file"])
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(self.words))
        return (path,)
