"""fxpass: whole-training-step mixed precision for PyTorch, as a Dynamo backend."""

from . import integrations as integrations
from .backend import MixedPrecision as MixedPrecision
from .backend import of as of
from .errors import CaptureError as CaptureError
from .errors import FxpassError as FxpassError
from .errors import LossScaleError as LossScaleError
from .errors import LoweringError as LoweringError
from .errors import OptimizerError as OptimizerError
from .errors import OptionError as OptionError
from .errors import VerifyError as VerifyError
from .hallway.graph_record import GraphRecord as GraphRecord
from .loop import Step as Step
from .loop import step as step
from .runtime.state import StepStats as StepStats
from .runtime.watch import Diagnosis as Diagnosis
from .runtime.watch import ParameterDiagnosis as ParameterDiagnosis
from .scaling import DynamicLossScale as DynamicLossScale
from .scaling import HeadroomLossScale as HeadroomLossScale
from .scaling import LossScale as LossScale
from .scaling import StaticLossScale as StaticLossScale
from .sharded import shard_ as shard_

__version__ = "0.1.0"
