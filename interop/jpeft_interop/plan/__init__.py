"""Whether a training step fits, and what it costs, before the machine is there: compiled for it, run nowhere."""

from ._plan import plan as plan
from ._results import CollectiveTotal as CollectiveTotal, Plan as Plan, StepPlan as StepPlan
