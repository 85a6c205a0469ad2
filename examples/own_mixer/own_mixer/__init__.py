"""A mixer, a task and a tracker outside of seqarch: importing this package registers them."""

import experiments
import seqarch
from own_mixer.mixers import LearntRetention
from own_mixer.tasks import Majority
from own_mixer.trackers import Printed

seqarch.register_mixer("learnt_retention", LearntRetention)
experiments.register_task("majority", Majority)
experiments.register_tracker("printed", Printed)
