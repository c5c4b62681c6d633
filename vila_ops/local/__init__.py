"""The servers of one machine: start, stop and look at MLflow, Prefect, its worker and a Ray head."""

from vila_ops.local.databases import UPGRADED as UPGRADED
from vila_ops.local.databases import copy_database as copy_database
from vila_ops.local.logs import follow as follow
from vila_ops.local.logs import last_lines as last_lines
from vila_ops.local.logs import lines_of as lines_of
from vila_ops.local.machine import ServerStatus as ServerStatus
from vila_ops.local.machine import down as down
from vila_ops.local.machine import owns as owns
from vila_ops.local.machine import runs as runs
from vila_ops.local.machine import status as status
from vila_ops.local.machine import up as up
from vila_ops.local.process import RESTORING as RESTORING
from vila_ops.local.process import ProcessRecord as ProcessRecord
from vila_ops.local.process import lock as lock
from vila_ops.local.process import log_of as log_of
from vila_ops.local.process import logs_of as logs_of
from vila_ops.local.process import root_of as root_of
from vila_ops.local.servers import Endpoints as Endpoints
from vila_ops.local.servers import endpoints as endpoints
from vila_ops.local.servers import env as env
from vila_ops.local.servers import join as join
from vila_ops.local.servers import login as login
