"""The servers of one machine: start, stop and look at MLflow, Prefect, its worker and a Ray head."""

from vila_ops.local.machine import ServerStatus as ServerStatus
from vila_ops.local.machine import down as down
from vila_ops.local.machine import owns as owns
from vila_ops.local.machine import runs as runs
from vila_ops.local.machine import status as status
from vila_ops.local.machine import up as up
from vila_ops.local.process import ProcessRecord as ProcessRecord
from vila_ops.local.servers import Endpoints as Endpoints
from vila_ops.local.servers import endpoints as endpoints
from vila_ops.local.servers import env as env
from vila_ops.local.servers import join as join
