"""What a run trains: a step's state, with rows and models that a run can also prepare, renew, save and fingerprint."""

from gist_dist.core.step import TrainState
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Guide, Student


class RunTrainState(TrainState):
    """As core/step.py has it, but for the types: there they are the Protocols that a step needs."""

    corpus: Corpus
    student: Student
    guide: Guide | None
