# Opens a terminal, has a session at it with another group in the foreground that waits for input, and closes the terminal's master.
use strict;
use warnings;
use Fcntl;
use POSIX;

alarm 60;
my ($n, $buffer) = (0, pack "i", 0);
sysopen(my $master, "/dev/ptmx", O_RDWR | O_NOCTTY) or die "ptmx: $!";
ioctl($master, 0x40045431, $buffer) or die "unlock: $!";
ioctl($master, 0x80045430, $buffer) or die "number: $!";
$n = unpack "i", $buffer;
pipe(my $from, my $to) or die;
sub report { syswrite $to, "@_\n" }

my $leader = fork // die;
if (!$leader) {
    close $master;
    close $from;
    POSIX::setsid();
    sysopen(my $tty, "/dev/pts/$n", O_RDWR) or die "tty: $!";
    my $signalled;
    $SIG{HUP} = sub { $signalled = 1 };
    my $foreground = fork // die;
    if (!$foreground) {
        $SIG{HUP} = $SIG{TTOU} = 'IGNORE';
        setpgid(0, 0);
        POSIX::tcsetpgrp(fileno $tty, $$) or die "foreground: $!";
        report "ready";
        my $read = sysread $tty, my $b, 9;
        $read = sysread $tty, $b, 9 if !defined $read && $! == EIO;    # Linux: EIO for who waits already, then the end
        report "foreground: read", ($read // $! + 0);
        report "foreground: write", (defined syswrite($tty, "x") ? "done" : $! + 0);
        my $r = '';
        vec($r, fileno $tty, 1) = 1;
        report "foreground: poll" if select($r, undef, undef, 30) == 1;
        report "foreground: ioctl", (ioctl($tty, 0x5401, my $termios = "\0" x 64) ? "done" : $! + 0);
        exit;
    }
    select undef, undef, undef, 0.05 until $signalled;
    report "leader: SIGHUP";
    waitpid $foreground, 0;
    exit;
}
close $to;
my $line = <$from>;
die "not ready" if $line ne "ready\n";
close $master;
print while <$from>;
waitpid $leader, 0;
