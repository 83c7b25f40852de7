"""The interpreter: runs any traced function with adapted weights in place of plain ones."""

from ._custom import DIFFERENTIATED_THROUGH as DIFFERENTIATED_THROUGH
from ._explain import Explanation as Explanation, explain as explain
from ._infer import infer_layouts as infer_layouts
from ._lift import lift as lift
