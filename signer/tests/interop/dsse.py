"""signer against securesystemslib (DSSE) and in-toto's own library (statements). Started by `run`.

Usage: dsse.py SIGNER TESTKIT
"""

import base64
import copy
import json
import pathlib
import subprocess
import sys
import tempfile
import tomllib

from cryptography.hazmat.primitives import serialization
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

SIGNER, TESTKIT = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
IN_TOTO = "application/vnd.in-toto+json"

# Cases of the testkit where securesystemslib decides otherwise about the signatures, and why that is its own matter.
DIFFERENT = {
    "accepted/no-keyid": "it requires a keyid, which DSSE leaves optional (its issue 416)",
    "accepted/wrong-keyid": "it believes the keyid, which DSSE says is a hint (its issue 416)",
    "envelope/duplicate-payload": "Python's json takes the last of two equal keys; signer refuses both",
    "accepted/unpadded-base64": "it wants the padding",
}


def signer(*args, check=True):
    done = subprocess.run([SIGNER, *map(str, args)], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError(f"signer {args}: {done.stderr}")
    return done


def public_key(path):
    """The key in an SPKI file, under the key id that signer gives it."""
    keyid = json.loads(signer("key", "show", path, "--json").stdout)["keyid"]
    return SSlibKey.from_crypto(serialization.load_pem_public_key(path.read_bytes()), keyid=keyid)


def holds(envelope, keys, threshold):
    """Whether securesystemslib finds enough signatures."""
    try:
        Envelope.from_dict(copy.deepcopy(envelope)).verify(keys, threshold)
        return True
    except (VerificationError, ValueError, KeyError, TypeError):
        return False


def make_bundle(place):
    bundle = place / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text('{"kernel": {"build_id": "00", "release": "6.1"}, "variants": [{"name": "fast"}]}')
    (bundle / "text.bin").write_bytes(b"\x90" * 100)
    return bundle


def ours_for_them(place):
    """Two of our keys sign; they verify, want both for a threshold of two, and refuse what is edited."""
    bundle = make_bundle(place)
    policy = place / "p.toml"
    policy.write_text("schema = 1\n")
    for name in "alice", "bob":
        signer("key", "new", "-o", place / name)
        signer("sign", bundle, "--key", place / f"{name}.pem")
        signer("sign", policy, "--key", place / f"{name}.pem")
    keys = [public_key(place / f"{name}.pub.pem") for name in ("alice", "bob")]
    for path in bundle / "statement.dsse.json", place / "p.toml.dsse.json":
        envelope = json.loads(path.read_text())
        assert holds(envelope, keys, 2)
        assert not holds(envelope, keys[:1], 2)
        assert not holds({**envelope, "payloadType": "text/plain"}, keys, 1)
        payload = base64.b64decode(envelope["payload"])
        edited = {**envelope, "payload": base64.b64encode(payload.replace(b"sha256", b"sha257", 1)).decode()}
        assert not holds(edited, keys, 1)
        # in-toto's own reading of the statement.
        statement = json_format.Parse(payload, statement_pb2.Statement())
        Statement.copy_from_pb(statement).validate()


def theirs_for_us(place):
    """They make the key and sign; signer verifies, and refuses what is edited."""
    bundle = make_bundle(place)
    signer("key", "new", "-o", place / "scratch")
    signer("sign", bundle, "--key", place / "scratch.pem")
    path = bundle / "statement.dsse.json"
    payload = base64.b64decode(json.loads(path.read_text())["payload"])
    theirs = CryptoSigner.generate_ed25519()
    envelope = Envelope(payload, IN_TOTO, {})
    envelope.sign(theirs)
    path.write_text(json.dumps(envelope.to_dict()))
    public = place / "theirs.pub.pem"
    raw = serialization.load_pem_private_key(theirs.private_bytes, None).public_key()
    public.write_bytes(raw.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    assert signer("verify", bundle, "--trust", public).returncode == 0
    assert signer("verify", bundle, "--trust", place / "scratch.pub.pem", check=False).returncode == 2
    # Our key file in their hands signs the same bytes: Ed25519 is deterministic.
    pem = (place / "scratch.pem").read_bytes()
    ours = CryptoSigner(serialization.load_pem_private_key(pem, None))
    sign = Envelope(payload, IN_TOTO, {})
    signature = sign.sign(ours).signature
    path.unlink()
    signer("sign", bundle, "--key", place / "scratch.pem")
    mine = json.loads(path.read_text())["signatures"][0]["sig"]
    assert base64.b64decode(mine).hex() == signature


def testkit(_place):
    """Both find enough signatures, or too few, in the same envelopes of the testkit."""
    compared, different = 0, set()
    for path in sorted(TESTKIT.glob("*/*/case.toml")):
        case = tomllib.loads(path.read_text())
        name = "/".join(path.parts[-3:-1])
        target = path.parent / ("bundle" if case["verify"] == "bundle" else "policy.toml")
        sealed = target / "statement.dsse.json" if target.is_dir() else target.with_name("policy.toml.dsse.json")
        if case["verify"] == "trust" or not sealed.exists():
            continue
        try:
            envelope = json.loads(sealed.read_bytes())
        except (ValueError, RecursionError):
            continue
        files = list({(path.parent / file).read_bytes(): path.parent / file for file in case["trust"]}.values())
        theirs = holds(envelope, [public_key(file) for file in files], case["threshold"])
        trust = [arg for file in case["trust"] for arg in ("--trust", path.parent / file)]
        said = json.loads(signer("verify", target, *trust, "--threshold", case["threshold"], "--json",
                                 check=False).stdout)
        ours = said["verified"] or said["reason"] not in ("envelope", "too-few-signatures", "unsigned", "too-large")
        compared += 1
        if ours != theirs:
            different.add(name)
    assert compared > 50, compared
    unexplained = different ^ set(DIFFERENT)
    assert not unexplained, f"decided otherwise: {sorted(unexplained)}"
    print(f"  {compared} envelopes compared, {len(different)} differences, all explained")


def main():
    failed = 0
    tests = [ours_for_them, theirs_for_us, testkit]
    for test in tests:
        with tempfile.TemporaryDirectory() as place:
            try:
                test(pathlib.Path(place))
                print(f"ok {test.__name__}: {test.__doc__}")
            except AssertionError as error:
                failed += 1
                line = error.__traceback__.tb_lineno
                print(f"FAILED {test.__name__}, line {line}: {error}")
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main())
