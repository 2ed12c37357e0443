# What open(O_TMPFILE) and linkat(2) do in an empty directory of one's own: prints what is not as on Linux, and "done" at the end.
# With "hold DIR...", what they do with files that were open while the machine was saved.
import ctypes, errno, fcntl, mmap, os, re, stat, sys, time

libc = ctypes.CDLL(None, use_errno=True)
FOLLOW, EMPTY, CWD = 0x400, 0x1000, -100
TMPFILE = os.O_TMPFILE
os.umask(0o022)


def check(what, got, want):
    if got != want:
        print(f"{what}: got {got}, want {want}")


def number(do):
    try:
        fd = do()
    except OSError as e:
        return errno.errorcode[e.errno]
    if fd is not None:
        os.close(fd)
    return "ok"


def create(flags=os.O_RDWR, mode=0o666, at="."):
    return os.open(at, TMPFILE | flags, mode)


def link(fd, name):
    if libc.linkat(CWD, b"/proc/self/fd/%d" % fd, CWD, name.encode(), FOLLOW):
        raise OSError(ctypes.get_errno(), name)


def link_empty(fd, name):
    if libc.linkat(fd, b"", CWD, name.encode(), EMPTY):
        raise OSError(ctypes.get_errno(), name)


if sys.argv[1] == "hold":
    files = [(create(os.O_RDWR | excl, at=dir), dir, excl) for dir in sys.argv[2:] for excl in (0, os.O_EXCL)]
    for fd, dir, _ in files:
        os.write(fd, b"kept in " + dir.encode())
    print("ready", flush=True)
    while not os.path.exists(sys.argv[2] + "/go"):
        time.sleep(0.02)
    for fd, dir, excl in files:
        name = dir + "/held"
        check("content", os.pread(fd, 100, 0).decode(), "kept in " + dir)
        check("links", os.fstat(fd).st_nlink, 0)
        check("link in " + dir, number(lambda: link(fd, name)), "ENOENT" if excl else "ok")
        if not excl:
            check("content of the name", open(name).read(), "kept in " + dir)
            os.unlink(name)
    print("done")
    sys.exit()

dir, other = sys.argv[1:3]  # other is of another file system
os.chdir(dir)

# A file like others, but for its name.
fd = create()
st = os.fstat(fd)
check("mode", oct(st.st_mode), oct(stat.S_IFREG | 0o644))
check("links", st.st_nlink, 0)
check("owner", st.st_uid, os.geteuid())
check("device", st.st_dev, os.stat(".").st_dev)
check("flags", fcntl.fcntl(fd, fcntl.F_GETFL) & (TMPFILE | os.O_RDWR), TMPFILE | os.O_RDWR)
check("entries", os.listdir("."), [])
path = os.readlink(f"/proc/self/fd/{fd}")
check(f"path {path}", bool(re.fullmatch(re.escape(dir) + r"/#\d+ \(deleted\)", path)), True)
check("write", os.write(fd, b"hello"), 5)
os.ftruncate(fd, 10000)
with mmap.mmap(fd, 10000) as m:
    check("map", m[:5], b"hello")
    m[9000:9003] = b"end"
check("what was written to the map", os.pread(fd, 3, 9000), b"end")
again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
check("open once more", os.read(again, 5), b"hello")
os.close(again)
os.fchmod(fd, 0o640)

# It gets names, and is an ordinary file.
link(fd, "a")
check("a name that is taken", number(lambda: link(fd, "a")), "EEXIST")
check("another file system", number(lambda: link(fd, other + "/a")), "EXDEV")
link(fd, "b")
check("entries", sorted(os.listdir(".")), ["a", "b"])
a = os.stat("a")
check("mode of the name", oct(a.st_mode), oct(stat.S_IFREG | 0o640))
check("links", (a.st_nlink, os.fstat(fd).st_nlink), (2, 2))
check("the same file", (a.st_dev, a.st_ino), (os.fstat(fd).st_dev, os.fstat(fd).st_ino))
check("device and inode since it was opened", (a.st_dev, a.st_ino), (st.st_dev, st.st_ino))
os.pwrite(fd, b"J", 0)
check("content", open("a", "rb").read(5), b"Jello")
os.unlink("a")
os.unlink("b")
check("links", os.fstat(fd).st_nlink, 0)
check("once all names are gone", number(lambda: link(fd, "a")), "ENOENT")
os.close(fd)

fd = create(os.O_WRONLY)
link_empty(fd, "c")
check("by AT_EMPTY_PATH", os.stat("c").st_nlink, 1)
os.close(fd)
check("it stays", os.listdir("."), ["c"])
os.rename("c", "d")
os.unlink("d")

fd = create(os.O_RDWR | os.O_EXCL)
check("O_EXCL", number(lambda: link(fd, "e")), "ENOENT")
check("O_EXCL by AT_EMPTY_PATH", number(lambda: link_empty(fd, "e")), "ENOENT")
os.close(fd)

# A name that was another's before: an overlay has something of its own in a lower layer, or a whiteout.
open("f", "w").close()
os.unlink("f")
fd = create()
link(fd, "f")
os.close(fd)
os.unlink("f")

# Its space is taken, and given back.
size = 32 << 20
free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
fd = create()
for _ in range(size >> 20):
    os.write(fd, bytes(1 << 20))
check("space is taken", free - os.statvfs(".").f_bavail * os.statvfs(".").f_frsize > size // 2, True)
os.close(fd)
check("space is free again", free - os.statvfs(".").f_bavail * os.statvfs(".").f_frsize < size // 2, True)

# Wrong uses.
os.symlink(".", "link")
open("file", "w").close()
os.mkdir("closed", 0o555)
os.mkdir("gone")
for what, do, want in [
    ("read-only", lambda: create(os.O_RDONLY), "EINVAL"),
    ("O_CREAT", lambda: create(os.O_RDWR | os.O_CREAT), "EINVAL"),
    ("no O_DIRECTORY", lambda: os.open(".", (TMPFILE & ~os.O_DIRECTORY) | os.O_RDWR, 0o600), "EINVAL"),
    ("a file", lambda: create(at="file"), "ENOTDIR"),
    ("below a file", lambda: create(at="file/x"), "ENOTDIR"),
    ("nothing", lambda: create(at="missing"), "ENOENT"),
    ("an empty path", lambda: create(at=""), "ENOENT"),
    ("a link", lambda: create(at="link"), "ok"),
    ("a link with O_NOFOLLOW", lambda: create(os.O_RDWR | os.O_NOFOLLOW, at="link"), "ENOTDIR"),
    ("without a right to write", lambda: create(at="closed"), "EACCES" if os.geteuid() else "ok"),
    ("no mode", lambda: create(mode=0), "ok"),
    ("truncated, appended to", lambda: create(os.O_WRONLY | os.O_TRUNC | os.O_APPEND), "ok"),
]:
    check(what, number(do), want)
fd = create(at="gone")
os.rmdir("gone")
check("its directory has gone", (os.write(fd, b"x"), number(lambda: link(fd, "late"))), (1, "ok"))
os.close(fd)
for name in ["late", "link", "file"]:
    os.unlink(name)
os.rmdir("closed")
check("entries", os.listdir("."), [])
print("done")
