"""What a config asks of the corpus files: one rule for bases, teachers, soft labels, students and selection."""

from pathlib import Path

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.cross_split import read_training_corpus
from kdecs.corpus.labels import map_corpus, read_table
from kdecs.corpus.pairs import training_subset
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import FINE_TO_COARSE, Corpus, Dialogue


def emotion_table(config: CorpusConfig) -> dict[str, str] | None:
    """What emotions are taken through: None as they are, else fine -> coarse with the config's own entries."""
    if config.emotions == "as-is":
        return None
    return read_table(config.emotion_table) if config.emotion_table else dict(FINE_TO_COARSE)


def read_split(config: CorpusConfig, path: Path) -> Corpus:
    """A labelled corpus file with its emotions as the config wants them. Raises CorpusError as `read_corpus`."""
    table = emotion_table(config)
    corpus = read_corpus(path)
    return corpus if table is None else map_corpus(corpus, table)


def training_dialogues(config: CorpusConfig) -> list[Dialogue]:
    """The training split without what `drop_cross_split` drops, then the seeded share of what is left.

    Raises CorpusError for a file that is missing or breaks the schema.
    """
    if config.drop_cross_split:
        others = [path for path in (config.valid, config.test) if path is not None]
        corpus = read_training_corpus(config.train, others)
        table = emotion_table(config)
        corpus = corpus if table is None else map_corpus(corpus, table)
    else:
        corpus = read_split(config, config.train)
    return training_subset(corpus.dialogues, config.train_share, config.train_share_seed)
