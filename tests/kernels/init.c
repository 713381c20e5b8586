// The first process of a guest without busybox. It mounts filesystems, runs the tests and prints their exit code.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
    struct utsname name;
    int status = 0;

    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
    uname(&name);
    printf("guest: release %s\n", name.release);
    fflush(stdout);

    pid_t tests = fork();
    if (tests == 0) {
        // The kernel puts unknown parameters of its command line into the environment. In FUSE_BACKING_EXPECT a comma
        // stands for a space.
        char *expect = getenv("FUSE_BACKING_EXPECT");
        for (char *c = expect; c && *c; c++)
            if (*c == ',')
                *c = ' ';
        execl("/tests", "/tests", "--color=never", "--test-threads=4", NULL);
        _exit(127);
    }
    // The first process must also wait for orphans.
    while (tests > 0 && waitpid(-1, &status, 0) != tests)
        ;
    printf("guest: exit code %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
    reboot(RB_AUTOBOOT);
    return 1;
}
