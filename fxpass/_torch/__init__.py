"""Every use of torch's private APIs, for torch 2.11 to 2.13. Nothing outside this folder imports them."""

from .aot import boxed as boxed
from .aot import compiling_flag as compiling_flag
from .aot import grad_with_forward_links as grad_with_forward_links
from .aot import python_values as python_values
from .aot import trace as trace
from .dynamo import install as install
from .dynamo_common import current_record as current_record
from .dynamo_optimizer import optimizer_step as optimizer_step
from .fake import fake_tensors as fake_tensors
from .fake import has_cuda as has_cuda
from .fake import is_fake as is_fake
from .handles import backend_of as backend_of
from .handles import innermost as innermost
from .handles import is_argument as is_argument
from .handles import source_name as source_name
from .inductor import Compiled as Compiled
from .inductor import compile_graph as compile_graph
from .inductor import cpu_has_half_gemm as cpu_has_half_gemm
from .inductor import decomposition as decomposition
from .inductor import inductor_settings as inductor_settings
from .inductor import mode_settings as mode_settings
from .optimizer import get_value as get_value
from .optimizer import has_own_step as has_own_step
from .optimizer import has_step_hooks as has_step_hooks
from .optimizer import note_step as note_step
from .record import FrameRecord as FrameRecord
