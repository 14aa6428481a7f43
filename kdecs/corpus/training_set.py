"""Which training dialogues a config asks for: one rule for bases, teachers, soft labels and students."""

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.cross_split import read_training_corpus
from kdecs.corpus.pairs import training_subset
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import Dialogue


def training_dialogues(config: CorpusConfig) -> list[Dialogue]:
    """The training split without what `drop_cross_split` drops, then the seeded share of what is left.

    Raises CorpusError for a file that is missing or breaks the schema.
    """
    if config.drop_cross_split:
        others = [path for path in (config.valid, config.test) if path is not None]
        dialogues = read_training_corpus(config.train, others).dialogues
    else:
        dialogues = read_corpus(config.train).dialogues
    return list(training_subset(dialogues, config.train_share, config.train_share_seed))
