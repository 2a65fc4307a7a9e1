"""The public names, each imported on first use: ``__init__.py`` reads them here, type checkers too."""

from vlmfix import methods as methods
from vlmfix import probes as probes
from vlmfix.calibration.calibrate import calibrate as calibrate
from vlmfix.clients.export import export as export
from vlmfix.decoding.edited import Edited as Edited
from vlmfix.decoding.flb import FLB as FLB
from vlmfix.decoding.guidance import Guidance as Guidance
from vlmfix.decoding.icd import ICD as ICD
from vlmfix.decoding.ifg import IFG as IFG
from vlmfix.decoding.lqcd import LQCD as LQCD
from vlmfix.decoding.m3id import M3ID as M3ID
from vlmfix.decoding.opera import OPERA as OPERA
from vlmfix.decoding.sid import SID as SID
from vlmfix.decoding.vcd import VCD as VCD
from vlmfix.engine.status import Status as Status
from vlmfix.errors import DataError as DataError
from vlmfix.errors import MethodError as MethodError
from vlmfix.errors import UnsupportedFeatureError as UnsupportedFeatureError
from vlmfix.errors import UnsupportedModelError as UnsupportedModelError
from vlmfix.errors import VlmfixError as VlmfixError
from vlmfix.methods.act import ACT as ACT
from vlmfix.methods.adaiat import AdaIAT as AdaIAT
from vlmfix.methods.adaptvis import AdaptVis as AdaptVis
from vlmfix.methods.adhh import ADHH as ADHH
from vlmfix.methods.allpath import AllPath as AllPath
from vlmfix.methods.base import Method as Method
from vlmfix.methods.cmai import CMAI as CMAI
from vlmfix.methods.eah import EAH as EAH
from vlmfix.methods.fia import FIA as FIA
from vlmfix.methods.hgai import HGAI as HGAI
from vlmfix.methods.iat import IAT as IAT
from vlmfix.methods.iri import IRI as IRI
from vlmfix.methods.measured import Calibration as Calibration
from vlmfix.methods.mma import MMA as MMA
from vlmfix.methods.modality_balance import ModalityBalance as ModalityBalance
from vlmfix.methods.none import NoMethod as NoMethod
from vlmfix.methods.pai import PAI as PAI
from vlmfix.methods.registry import list_methods as list_methods
from vlmfix.methods.spin import SPIN as SPIN
from vlmfix.methods.vaf import VAF as VAF
from vlmfix.methods.var import VAR as VAR
from vlmfix.methods.vhr import VHR as VHR
from vlmfix.methods.vista import VISTA as VISTA
from vlmfix.model.sink_dims import find_sink_dims as find_sink_dims
from vlmfix.observe.samples import CalibrationSample as CalibrationSample
from vlmfix.patching import patch as patch
from vlmfix.patching import patched as patched
from vlmfix.patching import status as status
from vlmfix.patching import unpatch as unpatch
from vlmfix.prefix import Prefix as Prefix
from vlmfix.prefix import shared_prefix as shared_prefix
from vlmfix.recipes import load_recipe as load_recipe
from vlmfix.recipes import save_recipe as save_recipe

__version__: str
__all__: list[str]
