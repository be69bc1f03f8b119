"""Make the security group of cluster.yaml: ssh from one network, everything between its members.

Reads: AWS credentials of the environment.  Writes: the group, and prints its id.
Run:   python deploy/aws_security_group.py us-west-2 203.0.113.7/32

Ray's own group is open to ssh from everywhere, whatever cluster.yaml says.
"""

import argparse
from ipaddress import ip_network


def make_group(region: str, ssh_from: str, vpc: str | None = None) -> str:
    """Return the id of a new security group.

    Args:
        region: of the cluster.
        ssh_from: network in CIDR notation, such as 203.0.113.7/32.
        vpc: id; the region's default one if None.

    Raises:
        ValueError: if `ssh_from` is no network, or the whole internet.
    """
    import boto3

    if ip_network(ssh_from).prefixlen == 0:
        raise ValueError(
            f"ssh_from={ssh_from} is everyone; give your own network, as 203.0.113.7/32"
        )
    ec2 = boto3.client("ec2", region_name=region)
    if vpc is None:
        default = [{"Name": "is-default", "Values": ["true"]}]
        vpc = ec2.describe_vpcs(Filters=default)["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(
        GroupName="multimodal-ray", Description="Ray cluster: ssh from one network", VpcId=vpc
    )["GroupId"]
    address = "CidrIpv6" if ip_network(ssh_from).version == 6 else "CidrIp"
    ranges = "Ipv6Ranges" if address == "CidrIpv6" else "IpRanges"
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, ranges: [{address: ssh_from}]},
            # Ray's processes talk on ports that they choose; -1 is every protocol and port.
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    return group


def main() -> None:
    """Make the group that the command line describes."""
    parser = argparse.ArgumentParser(description="Make the security group of cluster.yaml.")
    parser.add_argument("region")
    parser.add_argument("ssh_from", help="network that may use ssh, such as 203.0.113.7/32")
    parser.add_argument("--vpc", help="id; the region's default one if left out")
    options = parser.parse_args()
    try:
        print(make_group(options.region, options.ssh_from, options.vpc))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
