"""The program: says where it listens, answers, and ends with Terraform.

Not `tf.runner`: that ends in the middle of a change when somebody interrupts Terraform, lives on when Terraform is
killed, and keeps its key in the home folder.
"""

from __future__ import annotations

import base64
import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tf.gen import grpc_controller_pb2 as controller
from tf.gen import grpc_controller_pb2_grpc as controllers
from tf.gen import grpc_stdio_pb2_grpc as stdio
from tf.gen import tfplugin_pb2_grpc as plugin

from ._provider import PglimitsProvider
from ._servicer import Plain, Servicer

_LOOKS_EVERY = 0.5
"""Seconds between two looks whether Terraform is still there."""


def serve() -> None:
    """Serve the Terraform that started this process."""
    terraform = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all; Terraform waits for what is under way
    done = threading.Event()

    class Controller(controllers.GRPCControllerServicer):
        def Shutdown(self, request: Any, context: Any) -> Any:
            done.set()
            return controller.Empty()

    class Stdio(stdio.GRPCStdioServicer):
        def StreamStdio(self, request: Any, context: Any) -> Any:
            return iter([])

    provider = PglimitsProvider()
    server = grpc.server(ThreadPoolExecutor(max_workers=10))
    plugin.add_ProviderServicer_to_server(Plain(Servicer(provider)), server)
    controllers.add_GRPCControllerServicer_to_server(Controller(), server)
    stdio.add_GRPCStdioServicer_to_server(Stdio(), server)
    certificate, credentials = _certificate()
    with tempfile.TemporaryDirectory(prefix="pgl-") as folder:
        server.add_secure_port(f"unix://{folder}/provider", credentials)
        server.start()
        # Versions of go-plugin's protocol and of Terraform's, where it listens, and whom to trust.
        trusted = base64.b64encode(certificate).decode().rstrip("=")
        print(f"1|6|unix|{folder}/provider|grpc|{trusted}", flush=True)
        while not done.wait(_LOOKS_EVERY) and os.getppid() == terraform:
            pass
        server.stop(grace=5).wait()  # what is under way is finished, also for a Terraform that was killed
    if done.is_set():
        provider.close()
    os._exit(0)  # without waiting for a call that waits for a lock in the database


def _certificate() -> tuple[bytes, Any]:
    """A certificate for this run alone, and what the server needs for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return certificate.public_bytes(serialization.Encoding.DER), grpc.ssl_server_credentials([(private, pem)])
