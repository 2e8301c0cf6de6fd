"""Training data: where samples come from, and what is done with them before they are batches."""

from .augmentation import Augmentation, augmentation_sheet
from .few_shot import FewShot, few_shot_messages, nearest_examples, picture_features
from .lengths import add_lengths, sample_length
from .opening import OPENING_KEYS, open_training_data, opening_errors
from .readable import TooManyUnreadablePictures, UnreadableLog, UnreadablePicture, read_picture
from .samples import OpenedSamples, OpenedStream, open_pictures
from .source_settings import Source, spec_errors
from .sources import load_training_data


__all__ = [
    "OPENING_KEYS",
    "Augmentation",
    "FewShot",
    "OpenedSamples",
    "OpenedStream",
    "Source",
    "TooManyUnreadablePictures",
    "UnreadableLog",
    "UnreadablePicture",
    "add_lengths",
    "augmentation_sheet",
    "few_shot_messages",
    "load_training_data",
    "nearest_examples",
    "open_pictures",
    "open_training_data",
    "opening_errors",
    "picture_features",
    "read_picture",
    "sample_length",
    "spec_errors",
]
