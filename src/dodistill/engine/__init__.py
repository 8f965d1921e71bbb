"""The engine of a run: its inputs (`Job`), four parts (`Acquirer`, `Matcher`, `Scorer`, `Meter`) and the loop."""

from ..core.batch import Drawn as Drawn
from .acquire import Acquirer as Acquirer
from .job import Job as Job
from .job import Test as Test
from .loop import Distiller as Distiller
from .match import Matcher as Matcher
from .meter import Diverged as Diverged
from .meter import Meter as Meter
from .score import Scorer as Scorer
