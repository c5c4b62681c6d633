"""What this machine, a store or a cluster lacks, and how to fix it."""

from vila_ops.doctor.finding import Finding as Finding
from vila_ops.doctor.machine import examine as examine
from vila_ops.doctor.services import device_findings as device_findings
from vila_ops.doctor.services import refuse as refuse
from vila_ops.doctor.services import services as services
from vila_ops.doctor.services import serving as serving
